"""One POST to an OpenAI-compatible server, tried again where that can help.

The key comes from the environment variable OPENAI_API_KEY and is written nowhere.
"""

import http.client
import json
import os
import random
import time
import urllib.error
import urllib.request

from runtime.errors import UserError

TRIES, PAUSE = 6, 1.0  # seconds before the second try, doubled before each other one
TRY_AGAIN = (408, 409, 429)  # statuses below 500 that pass by themselves


def post_json(base, path, body, read, timeout=60.0):
    """What `read` makes of the reply (bytes -> value, or ValueError); None when no reply could be read.

    timeout: seconds.  Tried again, after pauses that double: a busy or broken server, a hang, half a
    reply, one that breaks the rules.  Raises UserError when the server refuses for good or is not there.
    """
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    if not base.startswith(("http://", "https://")):
        raise UserError(f"{base}: an endpoint begins with http:// or https://")
    url, data = base.rstrip("/") + path, json.dumps(body).encode()
    down = None
    for n in range(TRIES):
        if n:
            time.sleep(PAUSE * 2 ** (n - 1) * (0.5 + random.random()))
        try:
            request = urllib.request.Request(url, data, headers)
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                text = reply.read()
            down = None
            return read(text)
        except urllib.error.HTTPError as e:
            if e.code not in TRY_AGAIN and e.code < 500:
                raise UserError(f"{base}: refuses ({e.code} {e.reason})") from None
            down = None
        except urllib.error.URLError as e:
            down = str(e.reason)
        except (ValueError, KeyError, IndexError, TypeError, OSError, http.client.HTTPException):
            pass  # half a reply, or one that breaks the rules
    if down:
        raise UserError(f"{base}: no answer after {TRIES} tries ({down})")
    return None
