"""A Hugging Face Hub on the loopback interface, for tests that drive the real ``huggingface_hub`` client.

Everything is held in memory and can be inspected afterwards. The client reads its constants when it is imported, so it
has to run in a child process:

    with HubServer() as hub:
        subprocess.run([sys.executable, "push.py"], env=hub.environment(tmp_path), check=True)
        assert "config.json" in hub.repos["tester/bert"].files()

Where the real service computes something (the task of a model, its library), this one only repeats what the model card
says, so that a library which forgets to write it is found out.
"""

from .server import HubServer
from .store import Commit, Pointer, Repo

__all__ = ["Commit", "HubServer", "Pointer", "Repo"]
