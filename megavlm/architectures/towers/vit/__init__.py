"""A vision transformer on square images: Qwen-VL's, CLIP's and SigLIP's."""
