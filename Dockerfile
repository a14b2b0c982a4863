# megadyn in a container, with the versions that it is tested with.
#   docker build --target cpu -t megadyn:cpu .
#   docker build --target cuda -t megadyn:cuda .
#   docker run --rm -v "$PWD:/work" megadyn:cpu megadyn new quickstart

FROM python:3.11-slim-bookworm AS cpu
# DeepSpeed compiles small extensions as they are first used.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential \
    && rm -rf /var/lib/apt/lists/*
ENV DS_ACCELERATOR=cpu DS_BUILD_OPS=0 PIP_NO_CACHE_DIR=1
WORKDIR /opt/megadyn
COPY requirements.txt ./
# torch goes first and alone, from the index of CPU builds: another index gives gigabytes of CUDA with it.
RUN pip install --index-url https://download.pytorch.org/whl/cpu "$(grep '^torch==' requirements.txt)" \
    && pip install --requirement requirements.txt
COPY . .
RUN pip install --no-deps --no-build-isolation .
WORKDIR /work
CMD ["megadyn", "--help"]

# The devel image: Triton and DeepSpeed compile, and need a C compiler and Python's headers.
FROM nvidia/cuda:12.8.1-devel-ubuntu24.04 AS cuda
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
ENV DS_BUILD_OPS=0 PIP_NO_CACHE_DIR=1 VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH
RUN python3 -m venv /opt/venv
WORKDIR /opt/megadyn
COPY requirements.txt ./
RUN pip install "$(grep '^torch==' requirements.txt)" \
    && pip install --requirement requirements.txt
COPY . .
RUN pip install --no-deps --no-build-isolation .
WORKDIR /work
CMD ["megadyn", "--help"]
