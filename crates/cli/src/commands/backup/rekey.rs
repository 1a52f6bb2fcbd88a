//! `pgherd backup rekey`: what opens an encrypted repository.

use std::path::PathBuf;

use clap::Args;
use pgherd_agent::repository::{self, Rekey};

use crate::args::Global;
use crate::commands::repository_file;
use crate::failure::Failure;
use crate::output::confirm::confirm;
use crate::output::note;
use crate::output::numbers::counted;

/// Replace the passphrase or key of an encrypted repository, or what seals new objects
///
/// First the new secret is added, with --passphrase-file or --key-file: both open the repository. Then its file is put in the place of the former one on
/// each host, and in the end --retire, with a file that names the new one, makes the former secret worthless. Objects are not
/// rewritten: whoever has copied them and knew the former secret can still read those copies. With --new-data-key what is written from now
/// on is sealed by a key that former copies of the keys do not have; agents take it up when they open the repository again.
#[derive(Debug, Args)]
pub(super) struct RekeyArgs {
    /// File that says where the repository is and what opens it [default: that of the herd on this host]
    #[arg(long, value_name = "FILE")]
    repository: Option<PathBuf>,
    #[command(flatten)]
    what: What,
    /// Do not ask
    #[arg(long, requires = "retire")]
    yes: bool,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct What {
    /// File with another passphrase, for its owner only
    #[arg(long, value_name = "FILE")]
    passphrase_file: Option<PathBuf>,
    /// File with another key: 64 hexadecimal digits, for its owner only
    #[arg(long, value_name = "FILE")]
    key_file: Option<PathBuf>,
    /// Seal what is written from now on with a data key of its own
    #[arg(long)]
    new_data_key: bool,
    /// Delete what former secrets open the repository by
    #[arg(long)]
    retire: bool,
}

pub(super) async fn run(args: RekeyArgs, global: &Global) -> Result<(), Failure> {
    let file = repository_file(global, args.repository)?;
    let What { passphrase_file, key_file, retire, .. } = args.what;
    let what = match (passphrase_file, key_file) {
        (Some(path), _) => Rekey::Passphrase(path),
        (None, Some(path)) => Rekey::Key(path),
        (None, None) if retire => Rekey::Retire,
        (None, None) => Rekey::DataKey,
    };
    if what == Rekey::Retire {
        let warning = format!(
            "No secret opens the repository any more but the one that {} names: hosts that still have a former one archive and restore nothing.",
            file.display()
        );
        confirm(&warning, "Retire them?", args.yes)?;
    }
    let done = repository::rekey(&file, what.clone()).await.map_err(super::failed)?;
    note(&match what {
        Rekey::Passphrase(_) | Rekey::Key(_) => format!(
            "{} is opened by either secret now; put the new one into the place of the former on each host, then: pgherd backup rekey --retire",
            done.place
        ),
        Rekey::DataKey => format!("what is written to {} from now on has a data key of its own", done.place),
        Rekey::Retire => {
            format!("{} of {} gone", counted(done.retired, "former wrapping", "former wrappings"), done.place)
        }
    });
    Ok(())
}
