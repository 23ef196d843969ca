"""Take the pictures of the chat page that the documents show, with a headless Chromium.

    python tools/screenshots.py http://127.0.0.1:8000/chat --question "..."

The page must be up (`serve.page: true`) with two models; an API key is taken from
ALTIPLANO_API_KEY. Writes chat-page.png, chat-phone.png and chat-arena.png into docs/images; its
vote counts. Knows the page's element names, not what serves it; the page's tests click with the
same functions. Needs chromium and chromedriver; costs as long as the answers take.
"""

import argparse
import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selenium.webdriver import Chrome
    from selenium.webdriver.remote.webelement import WebElement

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
LAPTOP = (1280, 1100)
PATIENCE_S = 60.0
_PHONE = {"width": 412, "height": 915, "deviceScaleFactor": 1, "mobile": True}
_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
)


def missing_programs() -> list[str]:
    """Which of the two programs a browser takes are not installed."""
    return [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]


@contextlib.contextmanager
def browser(size: tuple[int, int] = LAPTOP) -> "Iterator[Chrome]":
    """A headless Chromium with a profile of its own that goes with it.

    Args:
        size: of the window, in pixels.
    """
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = shutil.which("chromium") or "chromium"
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        for flag in (*_FLAGS, f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}"):
            options.add_argument(flag)
        driver = Chrome(options, Service(shutil.which("chromedriver")))
        try:
            yield driver
        finally:
            driver.quit()


def shoot(url: str, question: str, key: str, images: Path) -> list[Path]:
    """Ask the question on the page and in its arena, and picture both.

    Args:
        url: address of the page.
        question: what is asked, typed as a visitor would.
        key: API key; may be empty.
        images: folder for the pictures.

    Returns:
        The files written.
    """
    pictures = [images / name for name in ("chat-page.png", "chat-phone.png", "chat-arena.png")]
    with browser() as driver:
        driver.get(url)
        if key:
            enter(driver, "key", key + "\n")
        wait(lambda: value(driver, "chat-model"), "the page offers a model")
        ask(driver, "chat", question)
        driver.save_screenshot(str(pictures[0]))
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", _PHONE)
        driver.save_screenshot(str(pictures[1]))
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        click(driver, "tab-arena-button")
        ask(driver, "arena", question)
        click(driver, "arena-vote-left")
        wait(lambda: "the vote counts" in value(driver, "arena-note"), "the vote counts")
        driver.execute_script("window.scrollTo(0, 0)")
        driver.save_screenshot(str(pictures[2]))
    return pictures


def find(driver: "Chrome", name: str, kind: str = "") -> "WebElement":
    """The element of that name, or what is of that kind within it, once it can be seen."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.expected_conditions import visibility_of_element_located
    from selenium.webdriver.support.wait import WebDriverWait

    place = (By.CSS_SELECTOR, f"#{name} {kind}".strip())
    found: WebElement = WebDriverWait(driver, PATIENCE_S, 0.05).until(
        visibility_of_element_located(place), f"#{name} {kind} is not on the page"
    )
    return found


def wait(holds: Callable[[], Any], what: str) -> None:
    """Wait until something holds.

    Raises:
        TimeoutError: it never did; names `what`.
    """
    from selenium.common.exceptions import StaleElementReferenceException

    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        with contextlib.suppress(StaleElementReferenceException):
            if holds():
                return
        time.sleep(0.05)
    raise TimeoutError(f"waited {PATIENCE_S} s in vain until {what}")


def enter(driver: "Chrome", name: str, text: str) -> None:
    """Type into a box, replacing what is there."""
    from selenium.webdriver.common.keys import Keys

    box = find(driver, name, f"textarea, #{name} input")
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys(Keys.BACKSPACE, text)


def click(driver: "Chrome", name: str) -> None:
    """Click a button once it is usable."""
    wait(lambda: find(driver, name).is_enabled(), f"#{name} is usable")
    button = find(driver, name)
    driver.execute_script(
        "arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", button
    )
    button.click()


def value(driver: "Chrome", name: str) -> str:
    """What stands in a box."""
    return str(find(driver, name, f"textarea, #{name} input").get_property("value"))


def text(driver: "Chrome", name: str) -> str:
    """What can be read in an element."""
    return find(driver, name).text


def ask(driver: "Chrome", tab: str, question: str) -> None:
    """Send a question in the tab `chat` or `arena`, and wait for the end of the answer."""
    enter(driver, f"{tab}-question", question)
    click(driver, f"{tab}-send")
    # The box is emptied, and the button switched off, by one and the same update.
    wait(
        lambda: not value(driver, f"{tab}-question") and find(driver, f"{tab}-send").is_enabled(),
        "the answer is complete",
    )


def main() -> None:
    """Read the command line and take the pictures."""
    parser = argparse.ArgumentParser(description="Picture the chat page.")
    parser.add_argument("url", help="address of the page, e.g. http://127.0.0.1:8000/chat")
    parser.add_argument("--question", default="Tell me a story about a little cat.")
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder for the pictures")
    arguments = parser.parse_args()
    if missing := missing_programs():
        parser.error(f"not installed: {', '.join(missing)}")
    key = os.environ.get("ALTIPLANO_API_KEY", "")
    for picture in shoot(arguments.url, arguments.question, key, arguments.images):
        print(picture)


if __name__ == "__main__":
    main()
