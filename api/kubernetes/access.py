"""Where the API server is and who we are to it: kubeconfig or service account, read by the official client.

The client knows every form of credentials there is (tokens that are rotated in files, exec plugins, client
certificates, proxies); from its `Configuration` we take what a request of our own needs.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import kubernetes.client.rest
import kubernetes.config
import yaml

from undermesh.api.problems import InputError, Problem

# The client is typed in parts only.
_rest: Any = kubernetes.client.rest
_config: Any = kubernetes.config
_Configuration: Any = kubernetes.client.Configuration

_HOST_VARIABLE: Final = "KUBERNETES_SERVICE_HOST"


@dataclass(frozen=True)
class Connection:
    """What one request needs.

    Attributes:
        server: URL without a slash at its end.
        headers: Credentials.
        tls: None for plain HTTP.
        server_name: The name in the server's certificate if it is not the URL's host.
        proxy: URL of an HTTP proxy.
    """

    server: str
    headers: Mapping[str, str]
    tls: ssl.SSLContext | None
    server_name: str | None
    proxy: str | None


class Access:
    """Credentials of one API server.

    Args:
        kubeconfig: A kubeconfig file; None: the pod's service account, or outside of a pod $KUBECONFIG or
            ~/.kube/config.

    Raises:
        InputError: the credentials cannot be read.
    """

    def __init__(self, kubeconfig: Path | None = None) -> None:
        self._kubeconfig = kubeconfig
        self._tls: tuple[object, ssl.SSLContext] | None = None
        self._configuration = self._load()
        self.connection()

    @property
    def server(self) -> str:
        """The API server's URL."""
        return str(self._configuration.host).rstrip("/")

    def renew(self) -> None:
        """Read everything again: the server refused what we have. Blocks. Raises InputError."""
        self._configuration = self._load()

    def connection(self) -> Connection:
        """What is valid now. Blocks: it may read files or run a credential plugin. Raises InputError."""
        configuration = self._configuration
        try:
            settings = configuration.auth_settings()
            headers = {entry["key"]: entry["value"].strip() for entry in settings.values() if entry["value"]}
            if not headers and configuration.username:
                headers = {"authorization": configuration.get_basic_auth_token() or ""}
            return Connection(
                self.server, headers, self._context(), configuration.tls_server_name, self._proxy(configuration)
            )
        except (kubernetes.config.ConfigException, OSError, ValueError) as error:
            raise self._error(error) from error

    def _load(self) -> Any:
        configuration = _Configuration()
        try:
            if self._kubeconfig is None and os.environ.get(_HOST_VARIABLE):
                _config.load_incluster_config(client_configuration=configuration)
            else:
                path = None if self._kubeconfig is None else str(self._kubeconfig)
                _config.load_kube_config(path, client_configuration=configuration, persist_config=False)
                if configuration.host == _Configuration().host:
                    raise ValueError("the cluster of its context names no server")
        # The client checks the file's form only by using it.
        except (
            kubernetes.config.ConfigException,
            OSError,
            ValueError,
            LookupError,
            TypeError,
            yaml.YAMLError,
        ) as error:
            raise self._error(error) from error
        return configuration

    def _error(self, error: Exception) -> InputError:
        if self._kubeconfig is not None:
            place, advice = str(self._kubeconfig), "correct the kubeconfig"
        elif os.environ.get(_HOST_VARIABLE):
            place, advice = "service account", "mount its token (automountServiceAccountToken)"
        else:
            place, advice = "kubeconfig", "name one, set $KUBECONFIG, or run in a pod"
        return InputError(Problem(place, f"no usable credentials ({str(error)[:256]}): {advice}"))

    def _context(self) -> ssl.SSLContext | None:
        """The TLS context, made again when one of its files has changed."""
        configuration = self._configuration
        if not self.server.startswith("https:"):
            return None
        files = (configuration.ssl_ca_cert, configuration.cert_file, configuration.key_file)
        key = (*map(_stamp, files), configuration.ca_cert_data, configuration.verify_ssl, configuration.assert_hostname)
        if self._tls is None or self._tls[0] != key:
            self._tls = key, _new_context(configuration)
        return self._tls[1]

    def _proxy(self, configuration: Any) -> str | None:
        if not configuration.proxy or _rest.should_bypass_proxies(self.server, configuration.no_proxy or ""):
            return None
        if urlsplit(configuration.proxy).scheme not in ("http", "https"):
            raise ValueError(f"proxy {configuration.proxy}: only HTTP proxies can be used")
        return str(configuration.proxy)


def _new_context(configuration: Any) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=configuration.ssl_ca_cert, cadata=configuration.ca_cert_data)
    # Python 3.13 sets it; the CAs of many clusters lack the key identifiers that it asks for.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    if configuration.cert_file:
        context.load_cert_chain(configuration.cert_file, configuration.key_file)
    if not configuration.verify_ssl:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif configuration.assert_hostname is False:
        context.check_hostname = False
    return context


def _stamp(path: str | None) -> tuple[str, int, int] | None:
    if not path:
        return None
    status = os.stat(path)
    return path, status.st_mtime_ns, status.st_ino
