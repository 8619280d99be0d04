# syntax=docker/dockerfile:1
# opcd on CPU, at the versions of deploy/requirements/cpu.txt. From the repository's root:
#   docker build --file deploy/docker/cpu.Dockerfile --tag opcd-cpu:0.1.0 .
# If pip would install PyTorch's CUDA build: --build-arg TORCH_INDEX=<address of PyTorch's CPU index>.
ARG PYTHON=3.11-slim-bookworm

# A separate layer for the large packages, which rarely change.
FROM python:${PYTHON} AS environment
ARG TORCH_INDEX=""
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/venv
COPY deploy/requirements/cpu.txt deploy/requirements/cpu-nodeps.txt /tmp/
RUN /opt/venv/bin/pip install ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} --requirement /tmp/cpu.txt \
    && /opt/venv/bin/pip install --no-deps ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} \
        --requirement /tmp/cpu-nodeps.txt

FROM python:${PYTHON} AS wheel
WORKDIR /src
COPY . .
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /dist .

FROM python:${PYTHON}
# g++: vLLM compiles a part of its sampler at first use. libnuma1: vLLM's kernels link to it.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libnuma1 \
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
