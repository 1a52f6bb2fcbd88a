//! `pgherd completions`: what a shell needs to complete pgherd's command lines.

use clap::Args;
use clap_complete::Shell;

use crate::args;
use crate::failure::Failure;
use crate::output::print;

/// Print completions for a shell
///
/// For bash: pgherd completions bash > /usr/share/bash-completion/completions/pgherd
#[derive(Debug, Args)]
pub(crate) struct CompletionsArgs {
    #[arg(value_name = "SHELL")]
    shell: Shell,
}

pub(crate) fn run(args: &CompletionsArgs) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut args::what_there_is(), "pgherd", &mut script);
    print(&String::from_utf8_lossy(&script))
}
