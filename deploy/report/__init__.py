"""One run as a page, several runs side by side: ``report.html`` from the files that runs leave behind.

Pure but for `reading` (run folders in) and `writing` (pages out); numpy and the standard library, nothing heavier.
"""
