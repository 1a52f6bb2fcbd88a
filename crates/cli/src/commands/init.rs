//! `pgherd init`: makes a new herd with this host as its first member.

use std::path::PathBuf;

use clap::Args;
use pgherd_agent::files::herd;
use pgherd_agent::setup;

use super::agent::{AgentPlace, dirs};
use super::herd_file;
use crate::args::Global;
use crate::failure::Failure;
use crate::output::{note, print_line};

/// Make a new herd with this host as its first member
///
/// Makes the store, the herd's certificate authority and all secrets. Refuses if any host of the herd file
/// already answers. Afterwards start this host's agent, and let the others join with tokens.
#[derive(Debug, Args)]
pub(crate) struct InitArgs {
    /// Name of this host's node in the herd file, where there is no agent file yet
    #[arg(long, value_name = "NAME")]
    node: Option<String>,
    /// Agent file of this host; made if it is missing [default: agent.toml in the directory]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

pub(crate) async fn run(args: InitArgs, global: &Global) -> Result<(), Failure> {
    let path = herd_file::find(global)?;
    let read = herd::read(&path.display().to_string(), &herd_file::read(&path)?)?;
    if !read.warnings.is_empty() {
        note(read.warnings.to_string().trim_end());
    }
    let place = AgentPlace::find(args.config, global)?;
    let api_port = |node: &str| {
        let mut agents = read.spec.agents();
        agents.find(|(name, _, _)| name.as_str() == node).map(|(_, _, port)| port)
    };
    let mut file = place.read_or_make(args.node.as_deref(), api_port)?;
    super::agent::refuse_root("init")?;
    let identity = setup::init(&read.spec, &file.name, &dirs(&file)).await?;
    file.herd = identity.herd_id.parse().ok();
    place.write(&file)?;
    print_line(&format!(
        "herd {} ({}) is made, with {} as its first member",
        identity.herd, identity.herd_id, file.name
    ))?;
    note(&format!("start its agent: pgherd agent --config {}", place.path().display()));
    note("for each other host: pgherd token NODE here, then there: pgherd agent --token-file FILE");
    Ok(())
}
