"""
A page in a real browser without a window: `python report_browser.py '{"page": …}'` prints what the page answered.

A process of its own, as a browser brings threads that the other tests do not want. The job has `page` (a file, or an
address), `steps` (name → JavaScript expression, evaluated in turn; of a name that begins with `until`, again and again
until it is true), `dark`, `size` and `screenshot` (a PNG, or null). The answer has a value for each step, what the
console said, and every address that the page asked for.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time


def ask_browser(page, steps, dark=False, size=(1100, 2400), screenshot=None):
    """What a browser answers to a job; the test is skipped where there is no browser."""
    import pytest

    if importlib.util.find_spec("PySide6") is None or importlib.util.find_spec("PySide6.QtWebEngineCore") is None:
        pytest.skip("no browser: install the extra 'browser' (PySide6-Addons with QtWebEngine)")
    job = {"page": str(page), "steps": steps, "dark": dark, "size": size, "screenshot": screenshot and str(screenshot)}
    done = subprocess.run([sys.executable, __file__, json.dumps(job)], capture_output=True, text=True, timeout=120)
    if "ImportError" in done.stderr:
        pytest.skip(f"no browser: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def main(job):
    scheme = f"--blink-settings=preferredColorScheme={0 if job['dark'] else 1}"
    os.environ["QT_QPA_PLATFORM"] = "offscreen"
    os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = f"--no-sandbox --disable-gpu {scheme}"

    from PySide6.QtCore import QEventLoop, QTimer, QUrl
    from PySide6.QtWebEngineCore import QWebEnginePage, QWebEngineProfile, QWebEngineUrlRequestInterceptor
    from PySide6.QtWebEngineWidgets import QWebEngineView
    from PySide6.QtWidgets import QApplication

    answer = {"steps": {}, "console": [], "requests": []}

    class Interceptor(QWebEngineUrlRequestInterceptor):
        def interceptRequest(self, info):
            answer["requests"].append(info.requestUrl().toString()[:200])

    class Page(QWebEnginePage):
        def javaScriptConsoleMessage(self, level, message, line, source):
            answer["console"].append(f"{message} (line {line})")

    def wait(start):
        """The value that `start` hands to its callback, or an error after half a minute."""
        loop, values = QEventLoop(), []
        start(lambda *value: (values.append(value), loop.quit()))
        QTimer.singleShot(30_000, loop.quit)
        if not values:
            loop.exec()
        if not values:
            raise TimeoutError("the browser did not answer in 30 seconds")
        return values[0]

    _app = QApplication(sys.argv[:1])
    profile, interceptor = QWebEngineProfile(), Interceptor()
    profile.setUrlRequestInterceptor(interceptor)
    page, view = Page(profile), QWebEngineView()
    view.setPage(page)
    view.resize(*job["size"])
    view.show()
    page.load(QUrl(job["page"]) if "://" in job["page"] else QUrl.fromLocalFile(job["page"]))
    (loaded,) = wait(page.loadFinished.connect)
    if not loaded:
        raise OSError(f"{job['page']} did not load")
    for name, script in job["steps"].items():
        deadline = time.monotonic() + 60
        while True:
            (text,) = wait(lambda done, script=script: page.runJavaScript(f"JSON.stringify({script})", 0, done))
            answer["steps"][name] = json.loads(text) if text else None
            if not name.startswith("until") or answer["steps"][name]:
                break
            if time.monotonic() > deadline:
                raise TimeoutError(f"{name}: still {text} after a minute; the console said {answer['console']}")
            wait(lambda done: QTimer.singleShot(100, done))
    if job["screenshot"]:
        wait(lambda done: QTimer.singleShot(400, done))  # the picture follows the page by some frames
        if not view.grab().save(job["screenshot"]):
            raise OSError(f"no screenshot was written to {job['screenshot']}")
    print(json.dumps(answer), flush=True)
    os._exit(0)  # Qt complains about the order in which Python would take the page and its profile apart


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
