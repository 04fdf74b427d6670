"""The demo of `make demo`: six things that undermesh does, each judged by what was observed.

stage      the cluster, its apps, the capture: what every scene needs
scenes     the six rows of the table, in order
traffic    orders to the client pods, and what became of their connections
telemetry  what ztunnel wrote about them: access log and metrics
report     rows, table, JSON
"""
