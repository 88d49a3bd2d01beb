"""Give pytest-xdist's processes whole files, so that a fixture of a module is made in one process."""

from xdist.scheduler import LoadScopeScheduling

# Tests that take turns in one process: each process would start a warm process of its own, which takes 10 s.
WARM = (
    "test_warm_process.py", "test_folders_of_a_project", "test_without_the_library",
    "test_two_processes.py", "test_a_disk_that_is_full_keeps", "test_a_cluster_ends", "test_killed_and_resumed",
    "test_new_process_gives", "test_commands_that_train_nothing", "test_both_doors_of_a_pushed",
    "for_a_reader_without_the_library", "test_one_layer_downloads_only_its_shard", "test_sharding.py",
)  # fmt: skip
# Files whose tests share nothing. They come last, so that all processes end at the same time.
ALONE = ("test_architectures.py", "test_every_mode.py")


class ByFile(LoadScopeScheduling):
    """Files go to processes in the order of collection; tests of `ALONE` go one by one, at the end."""

    def __init__(self, config, log=None):
        config.option.loadscopereorder = False
        super().__init__(config, log)

    def _split_scope(self, nodeid):
        if any(name in nodeid for name in WARM):
            return "warm"
        return nodeid if is_alone(nodeid) else nodeid.partition("::")[0]


def is_alone(nodeid):
    """Whether a test shares nothing with the others of its file."""
    return any(name in nodeid for name in ALONE)
