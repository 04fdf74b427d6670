"""A Kubernetes API server for the lab: everything that clients see of one, in one asyncio process.

No controllers live here, but for those that are part of the API itself: garbage collection, the end of namespaces,
addresses of Services. Modules that know no HTTP (`strategic`, `ssa`, `selectors`, `structural`, `rbac`, `table`, ...)
are pure; `registry` holds the rules of writes; `dispatch` and `resources` are the HTTP side; `server` joins them.
"""

from undermesh.lab.apiserver.server import ApiServer, Settings

__all__ = ["ApiServer", "Settings"]
