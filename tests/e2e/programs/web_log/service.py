"""Stands for somebody else's service: GET /ADDRESS tells its country, slowly, and fails now and then. Prints its port."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

asked = set()
lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        address = self.path.lstrip("/")
        time.sleep(0.02)
        with lock:
            is_first = address not in asked
            asked.add(address)
        if is_first and address.endswith("7"):
            self.send_error(503)  # the first time
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"country": "ABCDE"[sum(map(int, address.split("."))) % 5]}).encode())

    def log_message(self, *_):
        pass


with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
    print(server.server_address[1], flush=True)
    server.serve_forever()
