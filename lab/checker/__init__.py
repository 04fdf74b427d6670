"""The connection checker: thousands of connections of many shapes, each judged byte by byte and end by end.

What happens to the mesh meanwhile is an event; `expectations` says what each event may do to whom. It runs
without a mesh as well: whatever differs is a finding.
"""
