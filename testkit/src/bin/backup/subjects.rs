//! Who takes backups: pgherd, its peers, and the floor. Each has the same compression.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Arguments;
use crate::measured::bytes_below;
use crate::scene::{Scene, Server, USER};

pub(crate) const PGHERD: &str = "pgherd";
pub(crate) const PGBACKREST: &str = "pgBackRest";
pub(crate) const FLOOR: &str = "tar | zstd";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Who {
    Floor,
    Pgherd,
    PgBackRest,
    PgBaseBackup,
    Barman,
}

pub(crate) struct Subject<'s> {
    pub(crate) who: Who,
    scene: &'s Scene,
    server: &'s Server,
    jobs: String,
    readers: String,
    program: PathBuf,
}

impl<'s> Subject<'s> {
    /// Those that are installed; pgherd last.
    pub(crate) fn all(scene: &'s Scene, server: &'s Server, arguments: &Arguments) -> Vec<Subject<'s>> {
        let all = [
            (Who::Floor, PathBuf::from("zstd")),
            (Who::PgBackRest, PathBuf::from("pgbackrest")),
            (Who::PgBaseBackup, scene.program("pg_basebackup")),
            (Who::Barman, PathBuf::from("barman")),
            (Who::Pgherd, scene.path("pgherd")),
        ];
        let mut subjects = Vec::new();
        for (who, program) in all {
            let (jobs, readers) = (arguments.jobs.to_string(), arguments.readers.to_string());
            let subject = Subject { who, scene, server, jobs, readers, program };
            if arguments.alone && !matches!(who, Who::Floor | Who::Pgherd) {
                continue;
            }
            let mut help = if who == Who::Barman { scene.barman() } else { scene.command(&subject.program) };
            match help.arg("--help").output() {
                Ok(_) => subjects.push(subject),
                Err(error) => eprintln!("without {}, which does not run: {error}", subject.name()),
            }
        }
        subjects
    }

    pub(crate) fn name(&self) -> &'static str {
        match self.who {
            Who::Floor => FLOOR,
            Who::Pgherd => PGHERD,
            Who::PgBackRest => PGBACKREST,
            Who::PgBaseBackup => "pg_basebackup",
            Who::Barman => "Barman",
        }
    }

    fn home(&self) -> String {
        format!("repository-{:?}", self.who).to_lowercase()
    }

    fn command(&self) -> Command {
        self.server.at(self.scene.command(&self.program))
    }

    /// Begins an empty repository, and archives WAL into it from now on.
    pub(crate) fn prepare(&self) {
        let home = self.scene.fresh(&self.home());
        let (socket, port) = (self.server.socket_dir.display(), self.server.port);
        let shown = home.display();
        match self.who {
            Who::Floor | Who::PgBaseBackup => self.server.archive(self.scene, "true"),
            Who::Pgherd => {
                let file = self.scene.write("pgherd.toml", &format!("repository = \"file://{shown}\"\n"));
                let mut init = self.command();
                init.args(["backup", "init", "--repository"]).arg(&file);
                self.scene.done("pgherd backup init", init);
                let push = format!("{} wal push --repository {} %p", self.program.display(), file.display());
                self.server.archive(self.scene, &push);
            }
            Who::PgBackRest => {
                self.scene.write(
                    "pgbackrest.conf",
                    &format!(
                        "[global]\nrepo1-path={shown}\nrepo1-bundle=y\nrepo1-retention-full=9\ncompress-type=zst\ncompress-level=3\n\
                         process-max={}\nstart-fast=y\nlog-level-console=warn\nlog-level-file=off\nlock-path={shown}/lock\nlog-path={shown}\n\
                         spool-path={shown}/spool\n[bench]\npg1-path={}\npg1-socket-path={socket}\npg1-port={port}\npg1-user={USER}\n",
                        self.jobs,
                        self.server.data_dir.display(),
                    ),
                );
                let mut create = self.pgbackrest();
                create.arg("stanza-create");
                self.scene.done("pgbackrest stanza-create", create);
                let file = self.scene.path("pgbackrest.conf");
                let push = format!("pgbackrest --config={} --stanza=bench archive-push %p", file.display());
                self.server.archive(self.scene, &push);
            }
            Who::Barman => {
                let incoming = home.join("bench/incoming");
                let conninfo = format!("host={socket} port={port} user={USER} dbname=postgres");
                self.scene.write(
                    "barman.conf",
                    &format!(
                        "[barman]\nbarman_home = {shown}\nbarman_user = {USER}\nlog_file = {shown}/barman.log\nlog_level = WARNING\n\
                         [bench]\ndescription = bench\nconninfo = {conninfo}\nstreaming_conninfo = {conninfo}\nbackup_method = postgres\n\
                         archiver = on\nimmediate_checkpoint = true\npath_prefix = {}\n",
                        self.scene.program("").display(),
                    ),
                );
                let mut make = self.scene.command("mkdir");
                make.arg("-p").arg(&incoming);
                self.scene.done("mkdir", make);
                self.server.archive(self.scene, &format!("cp %p {}/%f", incoming.display()));
                let mut switch = self.barman();
                switch.args(["switch-wal", "--force", "--archive", "bench"]);
                self.scene.done("barman switch-wal", switch);
            }
        }
    }

    /// Archives into the repository again, after others have had their turn.
    pub(crate) fn resume(&self) {
        let push = match self.who {
            Who::Pgherd => {
                let file = self.scene.path("pgherd.toml");
                format!("{} wal push --repository {} %p", self.program.display(), file.display())
            }
            Who::PgBackRest => {
                let file = self.scene.path("pgbackrest.conf");
                format!("pgbackrest --config={} --stanza=bench archive-push %p", file.display())
            }
            _ => return,
        };
        self.server.archive(self.scene, &push);
    }

    pub(crate) fn remove(&self) {
        self.scene.remove(&self.home());
    }

    fn pgbackrest(&self) -> Command {
        let mut command = self.command();
        command.arg(format!("--config={}", self.scene.path("pgbackrest.conf").display()));
        command.arg("--stanza=bench");
        // These are options of pgBackRest's own, too.
        for name in ["PGHOST", "PGPORT", "PGUSER", "PGDATABASE"] {
            command.env_remove(name);
        }
        command
    }

    fn barman(&self) -> Command {
        let mut command = self.server.at(self.scene.barman());
        command.arg("--config").arg(self.scene.path("barman.conf"));
        command
    }

    fn pgherd(&self, arguments: &[&str]) -> Command {
        let mut command = self.command();
        command.args(arguments).arg("--repository").arg(self.scene.path("pgherd.toml"));
        command.args(["--jobs", &self.readers]);
        command
    }

    fn shell(&self, line: String) -> Command {
        let mut command = self.scene.command("sh");
        command.args(["-c", &line]);
        command
    }

    fn whole(&self) -> PathBuf {
        self.scene.path(&self.home()).join("whole.tar.zst")
    }

    pub(crate) fn full(&self) -> Command {
        let data_dir = &self.server.data_dir;
        match self.who {
            Who::Floor => self.shell(format!(
                "tar -C {} --exclude=./pg_wal -cf - . | zstd -3 -T{} -q -o {}",
                data_dir.display(),
                self.jobs,
                self.whole().display()
            )),
            Who::Pgherd => {
                let mut command = self.pgherd(&["backup", "create", "--fast", "--full", "--name", "bench"]);
                command.arg("--data-dir").arg(data_dir);
                command
            }
            Who::PgBackRest => {
                let mut command = self.pgbackrest();
                command.args(["--type=full", "backup"]);
                command
            }
            Who::PgBaseBackup => {
                let mut command = self.command();
                command.args(["-Ft", "-X", "none", "-c", "fast", "--compress"]);
                command.arg(format!("client-zstd:level=3,workers={}", self.jobs));
                command.arg("-D").arg(self.scene.path(&self.home()).join("base"));
                command
            }
            Who::Barman => {
                let mut command = self.barman();
                command.args(["backup", "bench"]);
                command
            }
        }
    }

    /// One that is built upon the last; none where there is no such thing.
    pub(crate) fn incremental(&self) -> Option<Command> {
        match self.who {
            Who::Pgherd => {
                let mut command = self.pgherd(&["backup", "create", "--fast", "--name", "bench"]);
                command.arg("--data-dir").arg(&self.server.data_dir);
                Some(command)
            }
            Who::PgBackRest => {
                let mut command = self.pgbackrest();
                command.args(["--type=incr", "backup"]);
                Some(command)
            }
            // pg_basebackup has it from 17 on, and with it Barman.
            Who::Floor | Who::PgBaseBackup | Who::Barman => None,
        }
    }

    /// What the last backup is in the repository, without WAL.
    pub(crate) fn stored_bytes(&self) -> u64 {
        let home = self.scene.path(&self.home());
        match self.who {
            Who::Floor | Who::PgBaseBackup => bytes_below(&home),
            Who::Pgherd => {
                let clusters = std::fs::read_dir(home.join("cluster")).into_iter().flatten().flatten();
                let parts = ["packs", "maps", "backup"];
                let of =
                    |cluster: PathBuf| parts.iter().map(|part| bytes_below(&cluster.join(part))).sum::<u64>();
                clusters.map(|cluster| of(cluster.path())).sum()
            }
            Who::PgBackRest => bytes_below(&home.join("backup")),
            Who::Barman => bytes_below(&home.join("bench/base")),
        }
    }

    /// Of the last full backup, to a directory that is not there, or with `delta` over what it was restored to.
    pub(crate) fn restore(&self, to: &Path, delta: bool) -> Option<Command> {
        match self.who {
            Who::Floor if !delta => Some(self.shell(format!(
                "mkdir -m 700 {to} && zstd -dcq {} | tar -C {to} -xf -",
                self.whole().display(),
                to = to.display()
            ))),
            Who::Pgherd => {
                let mut command = self.pgherd(&["restore", "--yes"]);
                command.arg("--to").arg(to);
                if delta {
                    command.arg("--delta");
                }
                Some(command)
            }
            Who::PgBackRest => {
                let mut command = self.pgbackrest();
                command.arg(format!("--pg1-path={}", to.display()));
                if delta {
                    command.arg("--delta");
                }
                command.arg("restore");
                Some(command)
            }
            Who::Barman if !delta => {
                let mut command = self.barman();
                command.args(["recover", "bench", "latest"]).arg(to);
                Some(command)
            }
            Who::Floor | Who::PgBaseBackup | Who::Barman => None,
        }
    }

    /// What reads a backup back, under whose name.
    pub(crate) fn verify(&self) -> Vec<(&'static str, Command)> {
        match self.who {
            Who::Floor => vec![(FLOOR, self.shell(format!("zstd -tq {}", self.whole().display())))],
            Who::Pgherd => {
                let mut stored = self.pgherd(&["backup", "verify"]);
                stored.arg("--stored");
                vec![(PGHERD, self.pgherd(&["backup", "verify"])), ("pgherd, --stored", stored)]
            }
            // Debian's version compares what is stored, and decompresses nothing.
            Who::PgBackRest => {
                let mut command = self.pgbackrest();
                command.arg("verify");
                vec![(PGBACKREST, command)]
            }
            Who::PgBaseBackup | Who::Barman => Vec::new(),
        }
    }
}
