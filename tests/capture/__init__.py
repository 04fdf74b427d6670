"""Capture as a pod sees it: real namespaces, real BPF, and this process in ztunnel's place."""
