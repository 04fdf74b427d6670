"""Objects from a Kubernetes API server.

`access` takes credentials from the official client, `api` carries bytes over HTTP, `watching` lists and
watches one resource into a `table`, `source` joins the tables to snapshots. What is decoded goes straight
from bytes to the structs of `undermesh.api`: the client's own models are not used. Nothing here knows of the
agent, the control plane or what the objects mean to them.
"""
