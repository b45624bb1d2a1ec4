"""Tells routers what is where: the event log, Dynamo's wire, NATS."""
