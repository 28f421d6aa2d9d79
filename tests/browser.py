"""A real headless Chromium that opens pages from disk, as a reader would."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement


class Browser:
    """One page at a time. No network: what a page would load from elsewhere is an error in its console."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(
        self, page: Path, *, width: int = 1280, height: int = 900, scheme: Literal["light", "dark"] = "light"
    ) -> None:
        """Show a file in a window of so many CSS pixels; at most 600 wide it is a phone: touched, without hovering."""
        is_phone = width <= 600
        self._send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=is_phone
        )
        self._send("Emulation.setTouchEmulationEnabled", enabled=is_phone)
        self._send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.driver.get(page.resolve().as_uri())

    def __call__(self, script: str, *arguments: Any) -> Any:
        """What a JavaScript expression is in the page; `arguments[0]` and so on are the arguments."""
        return self.driver.execute_script(f"return {script}", *arguments)

    def find(self, selector: str) -> WebElement:
        """The first element of a CSS selector."""
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def console_errors(self) -> list[str]:
        """What the page's console has had since this was last asked: errors and warnings."""
        return [f"{entry['level']}: {entry['message']}" for entry in self.driver.get_log("browser")]

    def overflow_pixels(self) -> int:
        """How far the page reaches beyond the window to the right."""
        return int(self("document.documentElement.scrollWidth - document.documentElement.clientWidth"))

    def screenshot(self, file: Path) -> None:
        """The whole page as a PNG."""
        picture = self._send("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(picture["data"]))

    def _send(self, command: str, **values: Any) -> Any:
        return self.driver.execute_cdp_cmd(command, values)


@contextmanager
def start_browser(folder: Path) -> Iterator[Browser]:
    """Debian's packages chromium and chromium-driver; what the browser keeps is in `folder`."""
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--force-color-profile=srgb",
                 "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder}"):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "WARNING"})
    driver = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
