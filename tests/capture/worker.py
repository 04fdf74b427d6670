"""A process that lives in a given cgroup and network namespace and does what it is told with sockets.

Started by remote.py as `worker.py FD NETNS CGROUP`; requests and replies are pickles with a 4-byte length on FD.
Each request runs in a thread of its own, so one blocking call holds up no other. The process ends with FD.
"""

import ctypes
import os
import pickle
import socket
import struct
import sys
import threading

CLONE_NEWNET = 0x40000000
libc = ctypes.CDLL(None, use_errno=True)


class Worker:
    def __init__(self, channel):
        self.channel = channel
        self.lock = threading.Lock()
        self.sockets = {}
        self.count = 0

    def keep(self, sock):
        with self.lock:
            self.count += 1
            self.sockets[self.count] = sock
            return self.count

    # === what can be asked for beside the methods of a socket ===

    def ready(self):
        """Answered once the process is where it belongs."""

    def socket(self, family, kind, protocol):
        return self.keep(socket.socket(family, kind, protocol))

    def accept(self, number):
        sock, address = self.sockets[number].accept()
        return self.keep(sock), address

    def close(self, number):
        self.sockets.pop(number).close()

    def disconnect(self, number):
        """connect() to AF_UNSPEC: the socket may be connected again."""
        address = struct.pack("=H14x", 0)
        check(libc.connect(self.sockets[number].fileno(), address, len(address)))

    def set_option_long(self, number, level, name, data, length):
        """setsockopt() with a buffer and a length of the caller's choice."""
        buffer = ctypes.create_string_buffer(data, max(length, len(data)))
        check(libc.setsockopt(self.sockets[number].fileno(), level, name, buffer, ctypes.c_uint32(length)))

    def race_mark(self, number, library, length, forbidden, harmless, tries):
        """race_marks() of race.c, compiled into a library."""
        return ctypes.CDLL(library).race_marks(self.sockets[number].fileno(), length, forbidden, harmless, tries)

    # === requests ===

    def serve(self):
        while True:
            head = self.channel.read(4)
            if len(head) < 4:
                os._exit(0)
            request = pickle.loads(self.channel.read(int.from_bytes(head, "big")))
            threading.Thread(target=self.answer, args=request, daemon=True).start()

    def answer(self, number, target, name, arguments):
        try:
            if target is None:
                outcome = True, getattr(self, name)(*arguments)
            elif name in ("accept", "close", "disconnect", "set_option_long", "race_mark"):
                outcome = True, getattr(self, name)(target, *arguments)
            else:
                outcome = True, getattr(self.sockets[target], name)(*arguments)
        except Exception as e:  # noqa: BLE001 - raised again by the caller
            outcome = False, e
        data = pickle.dumps((number, *outcome))
        with self.lock:
            self.channel.write(len(data).to_bytes(4, "big") + data)
            self.channel.flush()


def check(result):
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def main():
    descriptor, netns, cgroup = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    with open(os.path.join(cgroup, "cgroup.procs"), "w") as f:
        f.write(str(os.getpid()))
    namespace = os.open(netns, os.O_RDONLY)
    check(libc.setns(namespace, CLONE_NEWNET))
    os.close(namespace)
    channel = socket.socket(fileno=descriptor).makefile("rwb")
    Worker(channel).serve()


main()
