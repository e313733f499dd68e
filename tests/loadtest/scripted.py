"""A raw server that writes what it is told, byte by byte if need be, and no more."""

import socket
import threading


class Scripted:
    """Answers requests in order, over as many connections as are opened.

    An answer is bytes, or a list of pieces written one by one, or None: the connection is closed
    without a word. What is left of the script when it is closed is dropped.
    """

    def __init__(self, *answers: bytes | list[bytes] | None) -> None:
        self._answers = list(answers)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(10)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.num_connections = 0
        self.requests: list[bytes] = []
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        self._thread.join(10)
        self._listener.close()

    def _serve(self) -> None:
        while self._answers:
            peer, _ = self._listener.accept()
            self.num_connections += 1
            with peer:
                peer.settimeout(10)
                self._converse(peer)

    def _converse(self, peer: socket.socket) -> None:
        while self._answers and self._receive(peer):
            answer = self._answers.pop(0)
            if answer is None:
                return
            for piece in answer if isinstance(answer, list) else [answer]:
                peer.sendall(piece)

    def _receive(self, peer: socket.socket) -> bool:
        data = b""
        while b"\r\n\r\n" not in data:
            piece = peer.recv(1 << 16)
            if not piece:
                return False
            data += piece
        self.requests.append(data)
        return True
