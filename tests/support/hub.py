"""A stand-in of the Hugging Face Hub on this machine: what huggingface_hub asks of the server when a model is pushed."""

import base64
import contextlib
import http.server
import json
import re
import threading

ACCOUNTS = {"hf_writes": "me", "hf_reads": "reader"}  # token -> account
WRITERS = {"me"}  # accounts whose token may write


class Hub(http.server.ThreadingHTTPServer):
    """The server. Weights go up by Git LFS, other files within the commit, as on the hub.

    Attributes:
        repositories: name -> {"private": ..., "files": {name: content}}.
        asked: method and path of each request.
        is_private_by_default: whether a repository is private if nobody says so, a setting of the account.
        dies_at: part of a path; from the first such request on, the server answers no more.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories, self.asked, self.objects, self.dies_at, self.is_dead = {}, [], {}, None, False
        self.is_private_by_default = False
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, name, private=False, **files):
        """Create a repository, as if its owner had done so."""
        self.repositories[name] = {"private": private, "files": dict(files)}

    def files(self, name):
        """Return the files of a repository by name."""
        return self.repositories[name]["files"]


@contextlib.contextmanager
def running_hub():
    """Yield a server for the duration of the block."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer()

    do_POST = do_PUT = do_GET

    def answer(self):
        hub, path = self.server, self.path.partition("?")[0]
        hub.asked.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.is_dead = hub.is_dead or (hub.dies_at is not None and hub.dies_at in path)
        if hub.is_dead:
            self.close_connection = True  # and no answer
            return
        account = ACCOUNTS.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))
        for pattern, method in ROUTES.items():
            match = re.fullmatch(pattern, f"{self.command} {path}")
            if match:
                status, content = method(hub, account, body, *match.groups())
                break
        else:
            status, content = 404, {"error": f"the stand-in knows no {self.command} {path}"}
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        if status >= 400:
            self.send_header("X-Error-Message", content["error"])
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        self.wfile.write(text)


def whoami(hub, account, body):
    return (200, {"type": "user", "name": account, "orgs": []}) if account else (401, {"error": "Invalid credentials"})


def create(hub, account, body):
    asked = json.loads(body)
    owner = asked.get("organization") or account
    name = f"{owner}/{asked['name']}"
    url = {"url": f"{hub.url}/{name}"}
    if name in hub.repositories:
        return 409, {"error": "You already created this model repo", **url}
    if owner not in WRITERS or owner != account:
        return 403, {"error": f"You don't have the rights to create a model under the namespace {owner}"}
    private = asked["visibility"] == "private" if "visibility" in asked else asked.get("private", hub.is_private_by_default)
    hub.add(name, private=private)
    return 200, url


def info(hub, account, body, name):
    is_others = name.partition("/")[0] != account
    if name not in hub.repositories or is_others and hub.repositories[name]["private"]:
        return 404, {"error": "Repository not found"}
    return 200, {"id": name, "private": hub.repositories[name]["private"], "sha": "0" * 40, "siblings": []}


def tree(hub, account, body, name):
    if name not in hub.repositories:
        return 404, {"error": "Repository not found"}
    return 200, [{"type": "file", "path": path, "size": 1, "oid": "0" * 40} for path in hub.files(name)]


def preupload(hub, account, body, name):
    if account not in WRITERS or name.partition("/")[0] != account:
        return 403, {"error": "you must use a write token to upload to a repository."}
    modes = {True: "lfs", False: "regular"}
    paths = [file["path"] for file in json.loads(body)["files"]]
    files = [{"path": path, "uploadMode": modes[path.endswith(".safetensors")], "shouldIgnore": False} for path in paths]
    return 200, {"files": files}


def batch(hub, account, body, name):
    asked = json.loads(body)["objects"]
    objects = [{**item, "actions": {"upload": {"href": f"{hub.url}/upload/{item['oid']}"}}} for item in asked]
    return 200, {"transfer": "basic", "objects": objects}


def store(hub, account, body, oid):
    hub.objects[oid] = body
    return 200, {}


def commit(hub, account, body, name):
    files = hub.files(name)
    for line in map(json.loads, body.splitlines()):
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            files[value["path"]] = hub.objects[value["oid"]]
        elif line["key"] == "deletedFile":
            del files[value["path"]]
    return 200, {"success": True, "commitUrl": f"{hub.url}/{name}/commit/1", "commitOid": "1" * 40}


ROUTES = {
    r"GET /api/whoami-v2": whoami,
    r"POST /api/repos/create": create,
    r"POST /api/validate-yaml": lambda hub, account, body: (200, {"errors": [], "warnings": []}),
    r"GET /api/models/([^/]+/[^/]+)(?:/revision/main)?": info,
    r"GET /api/models/([^/]+/[^/]+)/tree/main": tree,
    r"POST /api/models/([^/]+/[^/]+)/preupload/main": preupload,
    r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch": batch,
    r"PUT /upload/(\w+)": store,
    r"POST /api/models/([^/]+/[^/]+)/commit/main": commit,
}
