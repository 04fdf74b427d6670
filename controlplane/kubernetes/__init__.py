"""What the control plane has in a cluster in place of files: its keys, its callers' tokens, its writings.

Everything here talks through `undermesh.api.kubernetes.api.Api`. Whatever is written by any replica is guarded
by a resourceVersion; what only one of them may write is done under the lease of `leader`.
"""
