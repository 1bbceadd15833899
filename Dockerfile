# megavlm on NVIDIA GPUs. Not built on the development machine, which has neither Docker images nor a GPU:
# treat the first build as a test. The base image brings torch, CUDA, NCCL and Transformer Engine, matched to
# each other; nothing below may replace them.
#
#   docker build -t megavlm .
#   docker build -t megavlm --build-arg APEX=1 .      # with NVIDIA Apex (its fused AdamW and norms; optional)
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:25.06-py3
FROM ${BASE_IMAGE}

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

# From its source: the package called `apex` on PyPI is something else. The build takes long.
ARG APEX=0
ARG APEX_TAG=25.09
RUN if [ "${APEX}" = "1" ]; then \
      git clone --depth 1 --branch "${APEX_TAG}" https://github.com/NVIDIA/apex /tmp/apex \
      && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation /tmp/apex \
      && rm -rf /tmp/apex; \
    fi

# What the image has stays: its torch and Transformer Engine are written down as constraints first.
RUN pip freeze | grep -iE '^(torch|transformer[-_]engine|numpy|triton)( |=)' > /tmp/image.txt; cat /tmp/image.txt
COPY constraints.txt /tmp/constraints.txt
RUN grep -iE '^(megatron-core|megatron-energon|nvidia-dali-cuda120|webdataset|multi-storage-client)==' \
      /tmp/constraints.txt > /tmp/ours.txt \
    && PIP_CONSTRAINT=/tmp/image.txt pip install --no-build-isolation -r /tmp/ours.txt

WORKDIR /opt/megavlm
COPY . .
RUN PIP_CONSTRAINT=/tmp/image.txt pip install --no-build-isolation -e . \
    && python -c "import torch, transformer_engine, megatron.core, nvidia.dali; print(torch.__version__)"

ENTRYPOINT []
CMD ["megavlm", "--help"]
