"""The seals of the coordinator's record that a site was shown, kept at the site: a record can be held to them later."""

import os
import time
from pathlib import Path

from fedscan.spec import Refused


class Heads:
    """A file to which a line is added for each new seal: when it was shown (seconds since 1970), and the seal."""

    def __init__(self, path: Path, durable: bool) -> None:
        self.path, self.durable = path, durable
        data = path.read_bytes() if path.exists() else b""
        self._whole = data.endswith(b"\n") or not data
        self.last = data[-67:-3].decode(errors="replace") if self._whole else ""

    def keep(self, seal: object) -> None:
        """Adds a seal, where it is another than the last, before anything is signed that names it.

        Raises Refused for what is none.
        """
        if seal in ("", self.last):
            return
        if not isinstance(seal, str) or len(seal) != 64 or set(seal) - set("0123456789abcdef"):
            raise Refused("a seal of the record is 64 hexadecimal digits")
        line = f'{{"time": {time.time():.3f}, "seal": "{seal}"}}\n'.encode()
        begin = b"" if self._whole else b"\n"
        self._whole = False  # until the line is on the disk
        with self.path.open("ab") as file:
            file.write(begin + line)
            if self.durable:
                file.flush()
                os.fsync(file.fileno())
        self._whole, self.last = True, seal
