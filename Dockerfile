# megavlm on NVIDIA GPUs. Not built here: the development machine has no Docker daemon and no GPU, so treat the first
# build as a test. `make lint` has hadolint read it; tools/image/wheels.sh and the installation from what it makes ran on a
# CPU, without what needs CUDA to compile.
#
#   docker build -t megavlm .
#   docker build -t megavlm --build-arg APEX=1 .              # with NVIDIA Apex (fused AdamW and norms)
#   docker build -t megavlm --build-arg BASE_IMAGE=nvcr.io/nvidia/pytorch:25.09-py3 .   # NGC: has Transformer Engine
#
# Where the network is forbidden, in two steps: the stage `wheels` is all that is fetched, and can be brought along.
#   docker build --target wheels --output type=local,dest=wheelhouse .                  # where there is a network
#   docker build -t megavlm --network none --build-context wheels=wheelhouse .          # where there is none
# The second needs the base image only (docker save, docker load), and the same build arguments.
# These versions ran together on one H200, by pip: torch 2.11 of CUDA 13, Transformer Engine 2.11, megatron-core 0.16.1.
ARG BASE_IMAGE=pytorch/pytorch:2.11.0-cuda13.0-cudnn9-devel
ARG APEX=0

# Apex by commit (tag 25.09), and only if it is asked for: the package called `apex` on PyPI is something else.
FROM scratch AS apex-0
FROM scratch AS apex-1
ADD https://github.com/NVIDIA/apex.git#4bdecd06b3c4b2c0a8fb6603829a8f9f05a42b49 /source
# hadolint ignore=DL3006
FROM apex-${APEX} AS apex

# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS download
# The newest Transformer Engine that megatron-core 0.16.1 names, which setup.py's extra `te` does too; an image that has one keeps its own.
ARG TE_VERSION=2.11.0
# Hopper; "8.0 9.0 10.0" adds A100 and Blackwell.
ARG TORCH_CUDA_ARCH_LIST=9.0
ARG MAX_JOBS=8
ENV TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST} MAX_JOBS=${MAX_JOBS} PIP_BREAK_SYSTEM_PACKAGES=1
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN python3 -m pip install --no-cache-dir wheel==0.48.0 packaging==26.3 ninja==1.13.2 pybind11==3.1.0
WORKDIR /src
COPY setup.py constraints.txt ./
COPY megavlm/__init__.py megavlm/
COPY tools/image/wheels.sh ./
# Debian's fonts, for megavlm render-text: only the files, which need no fontconfig.
WORKDIR /wheels/fonts
RUN apt-get update \
    && apt-get download fonts-dejavu-core fonts-liberation fonts-noto-cjk fonts-wqy-microhei fonts-wqy-zenhei \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
RUN --mount=type=bind,from=apex,target=/apex \
    if [ -d /apex/source ]; then cp -r /apex/source /tmp/apex && export APEX=/tmp/apex; fi \
    && TE_VERSION="${TE_VERSION}" bash wheels.sh /wheels setuptools==81.0.0 wheel==0.48.0 pyarrow \
       "nvidia-dali-cuda$(python3 -c 'import torch; print(torch.version.cuda.split(".")[0])')0" \
    && rm -rf /tmp/apex

FROM scratch AS wheels
COPY --from=download /wheels /

# hadolint ignore=DL3006
FROM ${BASE_IMAGE}
# An image is an environment of its own, whatever Debian says of its Python.
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_BREAK_SYSTEM_PACKAGES=1
RUN --mount=type=bind,from=wheels,target=/wheels \
    python3 -m pip install --no-index --no-deps --find-links /wheels --requirement /wheels/lock.txt \
    && find /wheels/fonts -name '*.deb' -exec dpkg-deb --extract {} / \;
WORKDIR /opt/megavlm
COPY setup.py pyproject.toml README.md LICENSE ./
COPY megavlm megavlm
COPY examples examples
COPY benchmarks benchmarks
COPY tools tools
# Importing needs no GPU, but Transformer Engine's libraries need the driver's, which only a running container has.
RUN python3 -m pip install --no-index --no-deps --no-build-isolation --editable . \
    && python3 -c "import torch, megatron.core, megatron.energon, nvidia.dali; print(torch.__version__)" \
    && python3 -c "from importlib.metadata import version; print('Transformer Engine', version('transformer-engine'))" \
    && megavlm --version
CMD ["megavlm", "--help"]
