# syntax=docker/dockerfile:1
# Two images from one file: `server` (SuperLink, executor, proxy, metrics) and `edge` (a node; no torch, ray, scipy,
# opacus). Nothing secret is copied in, and nothing runs as root; keys are mounted when a container starts.
#
#     docker build --target server --tag umbel-server .
#     docker build --target edge --tag umbel-edge .
#
# For a build that can be repeated, pin the base by digest: --build-arg PYTHON_IMAGE=python:3.11.13-slim-bookworm@sha256:…
ARG PYTHON_IMAGE=python:3.11.13-slim-bookworm

FROM ${PYTHON_IMAGE} AS edge-install
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY common common
COPY privacy privacy
COPY client client
COPY server server
COPY umbel umbel
RUN python -m venv /opt/umbel \
 && /opt/umbel/bin/python -m pip install --disable-pip-version-check --no-cache-dir --constraint constraints.txt .

FROM edge-install AS server-install
RUN /opt/umbel/bin/python -m pip install --disable-pip-version-check --no-cache-dir --constraint constraints.txt ".[server]"

FROM ${PYTHON_IMAGE} AS base
ENV PATH=/opt/umbel/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    FLWR_HOME=/tmp/flwr \
    FLWR_TELEMETRY_ENABLED=0 \
    FLWR_DISABLE_UPDATE_CHECK=1 \
    FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    OPENBLAS_NUM_THREADS=1 \
    UMBEL_LOG=json
# A new volume takes over owner and mode of the folder that it is mounted on, and the user is chosen at start.
RUN groupadd --system --gid 10001 umbel \
 && useradd --system --uid 10001 --gid umbel --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin umbel \
 && install --directory --mode 1777 /var/lib/umbel
WORKDIR /var/lib/umbel
USER 10001:10001
STOPSIGNAL SIGTERM

FROM base AS edge
COPY --from=edge-install /opt/umbel /opt/umbel
ENTRYPOINT ["umbel"]
CMD ["node", "/etc/umbel/node.toml"]
# A node ends when it cannot go on, so what is asked is whether it still runs (init's own line has no path in it).
HEALTHCHECK --interval=30s --timeout=5s --start-period=20s --retries=3 \
  CMD ["python", "-c", "import pathlib, sys; sys.exit(not any(b'/umbel\\0node\\0' in p.read_bytes() for p in pathlib.Path('/proc').glob('[0-9]*/cmdline')))"]

FROM base AS server
COPY --from=server-install /opt/umbel /opt/umbel
CMD ["flower-superlink", "--help"]
# SuperLink and the executor are started with this health address; the others bring a check of their own.
HEALTHCHECK --interval=15s --timeout=10s --start-period=30s --retries=4 \
  CMD ["python", "-m", "server.health", "grpc://127.0.0.1:9090"]
