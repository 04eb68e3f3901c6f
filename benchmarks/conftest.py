"""The marker of the benchmarks that CI runs."""


def pytest_configure(config) -> None:
    config.addinivalue_line("markers", "smoke: small enough for CI")
