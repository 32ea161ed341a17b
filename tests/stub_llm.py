"""An OpenAI-compatible endpoint that misbehaves, as a process of its own: `python stub_llm.py LOG`.

Prints its port.  Every question is answered rightly at its fourth asking at the latest; before that it
gets garbage, 429, 500, a hang or half a line, in turns.  LOG gets one line of JSON a request.
"""

import hashlib
import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

asked, lock = {}, threading.Lock()
TROUBLE = ("garbage", "429", "500", "hang", "half", "fields")


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        user = body["messages"][1]["content"]
        with lock:
            n = asked[user] = asked.get(user, 0) + 1
            entry = {"user": user, "system": body["messages"][0]["content"], "model": body["model"]}
            entry["key"] = self.headers.get("Authorization")
            with open(sys.argv[1], "a") as f:
                f.write(json.dumps(entry) + "\n")
        start = int(hashlib.sha256(user.encode()).hexdigest(), 16)
        trouble = TROUBLE[(start + n) % len(TROUBLE)] if n <= start % 4 else None
        worse = f"A wrong one ({len(user)})."
        good = {"bad_answer": worse, "explanation": "one fact", "usable": "unusable" not in user}
        if '"answer"' in body["messages"][0]["content"]:
            good = {"answer": "It is so."}
        if trouble == "garbage":
            return self.reply("Sure! Here is your answer: bad")
        if trouble == "fields":
            return self.reply(json.dumps(good | {"more": 1}))
        if trouble == "hang":
            time.sleep(3)
            return
        if trouble == "half":
            self.send_response(200)
            self.send_header("Content-Length", "500")
            self.end_headers()
            self.wfile.write(b'{"choices": [{"mess')
            return
        if trouble:
            self.send_response(int(trouble))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.reply(json.dumps(good))

    def reply(self, text):
        data = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
