# syntax=docker/dockerfile:1
# opcd on NVIDIA GPUs, at the versions of deploy/requirements/gpu.txt. From the repository's root:
#   docker build --file deploy/docker/gpu.Dockerfile --tag opcd-gpu:0.1.0 .
# The machine needs the driver and NVIDIA's container toolkit. DeepSpeed and vLLM compile kernels at first use, so the
# image keeps CUDA's compiler, of the CUDA release that PyTorch was built with.
ARG CUDA=13.0.1-devel-ubuntu24.04

# A separate layer for the large packages, which rarely change.
FROM nvidia/cuda:${CUDA} AS environment
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 DEBIAN_FRONTEND=noninteractive
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv
COPY deploy/requirements/gpu.txt /tmp/
RUN /opt/venv/bin/pip install --requirement /tmp/gpu.txt

FROM nvidia/cuda:${CUDA} AS wheel
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-venv python3-pip \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN python3 -m pip wheel --no-cache-dir --no-deps --wheel-dir /dist .

FROM nvidia/cuda:${CUDA}
ENV DEBIAN_FRONTEND=noninteractive
# The compiler and Python's headers: Triton builds small extensions at first use.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libnuma1 python3 python3-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --create-home opcd
COPY --from=environment /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist pip install --no-cache-dir --no-deps /dist/*.whl
WORKDIR /opt/opcd
COPY deploy/configs deploy/configs
USER 10001:10001
ENTRYPOINT ["opcd"]
CMD ["--help"]
