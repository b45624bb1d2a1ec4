"""The ZMQ link between an engine and its GPU workers: messages, endpoint, server, client."""
