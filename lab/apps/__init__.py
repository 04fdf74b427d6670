"""The apps that run in the lab's pods: standard library only, each one file, started by its path.

They know nothing of a mesh. Servers put a token into what they send, and say whom they see as their client.
"""
