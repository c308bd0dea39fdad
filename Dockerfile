# syntax=docker/dockerfile:1
# Three images from one file:
#   docker build --target gateway -t patchforge-gateway .            HTTP and gRPC; no torch
#   docker build --target worker -t patchforge-worker .              CPU
#   docker build --target worker-cuda -t patchforge-worker-cuda .    NVIDIA; the host needs the driver and its container toolkit
# Without Docker: make images. Another base must have Python 3.11 or newer with venv, and useradd.
ARG BASE=docker.io/library/python:3.12-slim-bookworm@sha256:54c85f3c47607a77f32adec749d3c81d1348bf25833671f512b26a9b6d778cb3

FROM ${BASE} AS base
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# Everything becomes one wheel, models and gRPC stubs included; neither tools nor sources get into an image.
FROM base AS wheel
RUN python3 -m venv /opt/build
WORKDIR /build
COPY . .
RUN /opt/build/bin/pip wheel --no-deps --wheel-dir /wheels .

FROM base AS gateway-env
RUN python3 -m venv /opt/patchforge
ENV PATH=/opt/patchforge/bin:$PATH
COPY requirements-gateway.lock /tmp/
RUN pip install --require-hashes --no-deps -r /tmp/requirements-gateway.lock
RUN --mount=from=wheel,source=/wheels,target=/wheels pip install --no-deps /wheels/*.whl

FROM base AS worker-env
RUN python3 -m venv /opt/patchforge
ENV PATH=/opt/patchforge/bin:$PATH
# Before torch, which would bring some of these itself, and by version only.
COPY requirements.lock /tmp/
RUN pip install --require-hashes --no-deps -r /tmp/requirements.lock
ARG TORCH=2.13.0
# The CPU build of PyTorch, from its own index; the package index has the CUDA build, which is gigabytes larger.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# Without its own tests, which are 80 MB.
RUN pip install --index-url ${TORCH_INDEX} torch==${TORCH} && rm -rf /opt/patchforge/lib/python3*/site-packages/torch/test
RUN --mount=from=wheel,source=/wheels,target=/wheels pip install --no-deps /wheels/*.whl

# The CUDA libraries come with the wheel, so that no CUDA base image is needed.
FROM base AS worker-cuda-env
RUN python3 -m venv /opt/patchforge
ENV PATH=/opt/patchforge/bin:$PATH
COPY requirements.lock /tmp/
RUN pip install --require-hashes --no-deps -r /tmp/requirements.lock
ARG TORCH=2.13.0
RUN pip install torch==${TORCH}
RUN --mount=from=wheel,source=/wheels,target=/wheels pip install --no-deps /wheels/*.whl

# What all images share: a user without rights, and servers that listen beyond the container.
FROM base AS runtime
RUN useradd --uid 10001 --no-create-home --home-dir /srv/patchforge --shell /usr/sbin/nologin patchforge
WORKDIR /srv/patchforge
ENV PATH=/opt/patchforge/bin:$PATH PATCHFORGE_HOST=0.0.0.0 PATCHFORGE_LOG_JSON=true

FROM runtime AS gateway
COPY --from=gateway-env /opt/patchforge /opt/patchforge
USER 10001:10001
EXPOSE 8000 50051
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s \
  CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
CMD ["patchforge", "gateway"]

FROM runtime AS worker-base
ENV PATCHFORGE_WORKER_METRICS_PORT=9100
USER 10001:10001
EXPOSE 9100
# The port opens once the models are loaded.
HEALTHCHECK --interval=10s --timeout=10s --start-period=120s \
  CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:9100/metrics', timeout=9)"]
CMD ["patchforge", "worker"]

FROM worker-base AS worker-cuda
COPY --from=worker-cuda-env /opt/patchforge /opt/patchforge

FROM worker-base AS worker
COPY --from=worker-env /opt/patchforge /opt/patchforge
