# tidings, the client, with no server framework in it. Built from the checkout's root:
#   docker build -f docker/client.Dockerfile -t tidings .

FROM python:3.12-slim AS build
WORKDIR /src
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/tidings
COPY requirements/client.txt requirements/
RUN /opt/tidings/bin/pip install --no-cache-dir --require-hashes -r requirements/client.txt
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
# gpgv checks signatures; gzip is an engine of recipes.
RUN apt-get update && apt-get install -y --no-install-recommends gpgv gzip \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --home-dir /data --shell /usr/sbin/nologin tidings \
    && install -d -o tidings -g tidings /data
COPY --from=build /opt/tidings /opt/tidings
ENV PATH=/opt/tidings/bin:$PATH PYTHONUNBUFFERED=1
USER tidings
VOLUME /data
ENTRYPOINT ["tidings"]
CMD ["--help"]
