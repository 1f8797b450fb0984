from manager.web.page import Page
RUNS = Page("runs", "/ui/runs", scope=None)
