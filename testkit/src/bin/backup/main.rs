//! What a base backup, a restore and the archive of WAL cost, beside pgBackRest, Barman and `pg_basebackup` in the same run.
//!
//! One PostgreSQL with a data set that is made once, and around it each subject with the same compression (zstd 3). They take turns,
//! round after round, so that what else the machine does meets all of them; what one has written is on the disk before the next
//! begins. The floor is `tar | zstd`, which knows nothing of what it copies and flushes nothing.
//!
//! CPU is user and system time of the subject's processes; `server` is that of PostgreSQL in the same time, with what it calls
//! (`archive_command`) and with whoever sends a base backup. Memory is the largest sum of what a subject's processes hold for themselves (`RssAnon`),
//! which leaves out the page cache and shared libraries.
//!
//! Hazard: everything is in the page cache, so disks are measured by what is written and not by what is read.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "the report is what this program is for")]

use std::path::PathBuf;

use clap::{Parser, ValueEnum};

mod base;
mod measured;
mod scene;
mod subjects;
mod wal;

use scene::Scene;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Full and incremental backups, restores, delta restores, verification
    Base,
    /// A backlog of WAL into the archive and out of it, and how far the archive is behind a busy server
    Wal,
    /// Memory with very many small relations
    Relations,
}

#[derive(Parser)]
#[command(about = "Measures backups, restores and the archive of WAL, beside their peers")]
struct Arguments {
    /// pgherd's program
    #[arg(long, value_name = "FILE")]
    pgherd: PathBuf,
    /// What streams WAL as an agent does: the example receive_wal of pgherd-agent
    #[arg(long, value_name = "FILE")]
    receiver: PathBuf,
    /// Barman's modules of Python, as `pip install --target` leaves them [default: the command barman]
    #[arg(long, value_name = "DIR")]
    barman: Option<PathBuf>,
    /// What to measure; everything by default
    #[arg(long = "part", value_enum)]
    parts: Vec<Part>,
    /// Rounds for each subject
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Of the data set: that of pgbench, and 23,333 rows of documents for each
    #[arg(long, default_value_t = 150)]
    scale: u32,
    /// Processes or compressing threads of each peer
    #[arg(long, default_value_t = 2)]
    jobs: u32,
    /// Files that pgherd reads beside each other; as many as it does by default
    #[arg(long, default_value_t = 4)]
    readers: u32,
    /// How long pgbench -N changes things before an incremental backup
    #[arg(long, default_value_t = 10)]
    seconds: u32,
    /// Backlog of WAL
    #[arg(long, value_name = "MIB", default_value_t = 4096)]
    wal_size: u64,
    /// Small relations
    #[arg(long, default_value_t = 200_000)]
    relations: u32,
    /// Works here, and keeps the data set for another run; the user postgres must be able to come here [default: a directory that goes]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Without its peers, for a profile
    #[arg(long)]
    alone: bool,
    /// Print every round
    #[arg(long)]
    verbose: bool,
    /// Directory of PostgreSQL's programs [default: Debian's newest]
    #[arg(long, value_name = "DIR")]
    bin_dir: Option<PathBuf>,
}

impl Arguments {
    fn wants(&self, part: Part) -> bool {
        self.parts.is_empty() || self.parts.contains(&part)
    }
}

fn main() {
    let arguments = Arguments::parse();
    let scene = Scene::new(&arguments);
    println!("{}", measured::machine());
    if arguments.wants(Part::Base) {
        base::measure(&scene, &arguments);
    }
    if arguments.wants(Part::Wal) {
        wal::measure(&scene, &arguments);
    }
    if arguments.wants(Part::Relations) {
        base::measure_relations(&scene, &arguments);
    }
}
