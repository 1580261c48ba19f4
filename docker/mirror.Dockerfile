# tidings-mirror: publish and serve. Built from the checkout's root:
#   docker build -f docker/mirror.Dockerfile -t tidings-mirror .

FROM python:3.12-slim AS build
WORKDIR /src
# Dependencies first: they change less often than the code. fastcdc has no compiled wheel off
# x86_64, hence the compiler, which stays in this stage.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/tidings
COPY requirements/server.txt requirements/
RUN /opt/tidings/bin/pip install --no-cache-dir --require-hashes -r requirements/server.txt
RUN python -m venv /opt/build
COPY requirements/build.txt requirements/
RUN /opt/build/bin/pip install --no-cache-dir --require-hashes -r requirements/build.txt
COPY pyproject.toml README.md LICENSE ./
COPY chunkstore chunkstore
COPY client client
COPY server server
COPY measure measure
RUN /opt/build/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation -w /dist . \
    && /opt/tidings/bin/pip install --no-cache-dir --no-deps --no-index /dist/*.whl

FROM python:3.12-slim
# rsync for mirrors that pull their tree; gzip is an engine of recipes.
RUN apt-get update && apt-get install -y --no-install-recommends rsync gzip \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --home-dir /srv/mirror --shell /usr/sbin/nologin tidings \
    && install -d -o tidings -g tidings /srv/mirror /var/lib/tidings
COPY --from=build /opt/tidings /opt/tidings
COPY docker/publish-loop /usr/local/bin/publish-loop
ENV PATH=/opt/tidings/bin:$PATH PYTHONUNBUFFERED=1
USER tidings
VOLUME /srv/mirror
EXPOSE 8080
STOPSIGNAL SIGTERM
CMD ["tidings-mirror", "serve", "/srv/mirror", "--host", "0.0.0.0", "--port", "8080"]
