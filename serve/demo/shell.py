"""Requests in plain language and the Unix command for each, for the demo's shell expert."""

from random import Random

SLOTS: dict[str, tuple[str, ...]] = {
    "dir": (
        "/var/log", "/etc", "/tmp", "/srv/data", "/opt/app", "~/projects", "~/Downloads", "src",
        "docs", "backup", "images", "build", "reports", "tests", "logs", "archive", "music",
    ),
    "ext": ("txt", "log", "csv", "py", "json", "jpg", "md", "html", "conf", "pdf", "c", "xml"),
    "file": (
        "access.log", "notes.txt", "data.csv", "report.txt", "users.txt", "server.log", "main.py",
        "results.csv", "hosts.txt", "config.ini", "errors.log", "names.txt", "words.txt",
    ),
    "word": (
        "error", "warning", "timeout", "TODO", "password", "admin", "failed", "import", "debug",
        "localhost", "connection", "version", "deprecated",
    ),
    "new": ("ready", "done", "public", "fixed", "alpha", "remote"),
    "user": ("alice", "bob", "deploy", "www-data", "maria", "backup"),
    "archive": ("backup.tar.gz", "site.tar.gz", "logs.tar.gz", "old.tar.gz", "release.tar.gz"),
    "host": ("web1", "db.example.com", "build-server", "10.0.0.5"),
    "mode": ("644", "600", "755", "640", "700"),
    "days": ("2", "3", "5", "7", "14", "30", "60", "90"),
    "size": ("5", "10", "50", "100", "200", "500"),
    "n": ("3", "5", "8", "10", "15", "20", "40"),
    "column": ("1", "2", "3", "4", "5"),
}  # fmt: skip

# (command, ways to ask for it)
COMMANDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ('find {dir} -type f -name "*.{ext}"', (
        "Find all {ext} files under {dir}",
        "I want every file in {dir} and below that ends in .{ext}",
        "Recursively locate *.{ext} inside {dir}",
    )),
    ('find {dir} -type f -name "*.{ext}" -mtime +{days} -delete', (
        "Delete {ext} files in {dir} that are older than {days} days",
        "Clean up {dir}: remove every .{ext} not changed for {days} days",
    )),
    ("find {dir} -type f -size +{size}M", (
        "Which files in {dir} are larger than {size} MB?",
        "Look for anything bigger than {size} megabytes under {dir}",
    )),
    ("find {dir} -type f -mtime -{days}", (
        "Show files below {dir} modified in the last {days} days",
        "What changed in {dir} during the past {days} days?",
    )),
    ("find {dir} -type d -empty", (
        "List the empty directories in {dir}",
        "Are there folders without content under {dir}? Print them",
    )),
    ('find {dir} -name "*.{ext}" -exec chmod {mode} {{}} +', (
        "Give all {ext} files in {dir} the permissions {mode}",
        "Set mode {mode} on each .{ext} file below {dir}",
    )),
    ('grep -rn "{word}" {dir}', (
        "Search for {word} in all files of {dir} and show line numbers",
        "Where does {word} occur inside {dir}? Include line numbers",
    )),
    ('grep -ic "{word}" {file}', (
        "Count the lines of {file} that contain {word}, ignoring case",
        "How many lines in {file} mention {word} in upper or lower case?",
    )),
    ('grep -v "{word}" {file}', (
        "Print the lines of {file} without {word}",
        "Show {file} but leave out every line with {word}",
    )),
    ('grep -rl "{word}" {dir} --include="*.{ext}"', (
        "Name the {ext} files in {dir} that contain {word}",
        "Only list which .{ext} files under {dir} have {word} in them",
    )),
    ("tar -czf {archive} {dir}", (
        "Pack {dir} into a compressed archive called {archive}",
        "Make a gzipped tarball {archive} from the folder {dir}",
    )),
    ("tar -xzf {archive} -C {dir}", (
        "Extract {archive} into {dir}",
        "Unpack the archive {archive} so that its content lands in {dir}",
    )),
    ("tar -tzf {archive}", (
        "What is inside {archive}? List it without unpacking",
        "Show the table of contents of the archive {archive}",
    )),
    ("du -sh {dir}", (
        "How much disk space does {dir} take?",
        "Print the total size of {dir} in readable units",
    )),
    ("du -ah {dir} | sort -rh | head -n {n}", (
        "Show the {n} largest files and folders in {dir}",
        "What are the top {n} space users below {dir}?",
    )),
    ("sort {file} | uniq -c | sort -rn | head -n {n}", (
        "What are the {n} most frequent lines of {file}?",
        "Count repeated lines in {file} and show the {n} most common",
    )),
    ("cut -d, -f{column} {file} | sort | uniq", (
        "List the distinct values of column {column} in the comma separated {file}",
        "Unique entries of field {column} of {file}, which uses commas",
    )),
    ("awk '{{ print ${column} }}' {file}", (
        "Print field {column} of every line of {file}",
        "Only show the whitespace separated column {column} from {file}",
    )),
    ('sed -i "s/{word}/{new}/g" {file}', (
        "Replace {word} by {new} everywhere in {file}, in place",
        "Edit {file} so that each {word} becomes {new}",
    )),
    ("tail -n {n} -f {dir}/{file}", (
        "Follow {dir}/{file}, starting with the last {n} lines",
        "Keep watching new lines of {file} in {dir} after showing {n} of them",
    )),
    ("head -n {n} {file}", (
        "Show the first {n} lines of {file}",
        "Print just the top {n} rows of {file}",
    )),
    ("wc -l {dir}/*.{ext}", (
        "Count the lines of all {ext} files in {dir}",
        "How many lines has each .{ext} file directly in {dir}?",
    )),
    ("chmod -R {mode} {dir}", (
        "Change the permissions of {dir} and all it contains to {mode}",
        "Recursively set {dir} to mode {mode}",
    )),
    ("chown -R {user}:{user} {dir}", (
        "Make {user} the owner and group of everything in {dir}",
        "Hand the whole folder {dir} over to {user}, user and group alike",
    )),
    ("rsync -av {dir}/ {user}@{host}:{dir}/", (
        "Copy the content of {dir} to the same path on {host} as {user}",
        "Synchronize {dir} with {host}, logging in as {user}",
    )),
    ("scp {file} {user}@{host}:{dir}", (
        "Copy {file} over ssh to {dir} on {host} as {user}",
        "Send {file} to the machine {host}, folder {dir}, user {user}",
    )),
    ("ps -u {user} -o pid,cmd", (
        "List process ids and commands that belong to {user}",
        "What is {user} running right now? Show pid and command",
    )),
    ('pkill -u {user} -f "{word}"', (
        "Stop the processes of {user} whose command line has {word}",
        "Kill everything matching {word} that {user} started",
    )),
    ("cp -r {dir} {dir}.bak", (
        "Make a copy of {dir} next to it with the suffix .bak",
        "Back up the folder {dir} under its name plus .bak",
    )),
    ("ls -lt {dir} | head -n {n}", (
        "Show details of the {n} newest entries in {dir}",
        "List {dir} by time, newest first, {n} lines only",
    )),
)  # fmt: skip
ENDINGS = ("", "", ".", " please.", " in bash.", " from the command line.")


def draw(rng: Random) -> tuple[str, str]:
    """One request and its command."""
    command, wordings = rng.choice(COMMANDS)
    words = {slot: rng.choice(values) for slot, values in SLOTS.items()}
    request = rng.choice(wordings).format(**words)
    if request[-1] != "?":
        request += rng.choice(ENDINGS)
    return request, command.format(**words)
