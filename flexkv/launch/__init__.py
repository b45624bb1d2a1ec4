"""A Dynamo deployment on one command: NATS, etcd, frontend and workers, each with flexkv."""
