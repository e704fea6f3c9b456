"""Study files: from TOML to a ``Study``, with every mistake named by file and line."""

from fedscan.studyfile.building import build, task_of, try_out
from fedscan.studyfile.cases import Cases, cache_folder, read_cases
from fedscan.studyfile.file import StudyFile, again, load

__all__ = ["Cases", "StudyFile", "again", "build", "cache_folder", "load", "read_cases", "task_of", "try_out"]
