"""The `undermesh` command: asks the agent of this node over its Unix socket, and prints tables or JSON.

Nothing here changes a node, and nothing here imports the agent: the command also has to run where undermesh does
not (preflight), and against an agent of another version. What is printed goes through `output`; what may fail
raises one of `errors`.
"""
