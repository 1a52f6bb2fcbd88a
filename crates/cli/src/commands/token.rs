//! `pgherd token`: a one-time token with which a host joins the herd.

use clap::Args;
use pgherd_api::join::TokenRequest;

use crate::args::Global;
use crate::connect::Agents;
use crate::failure::Failure;
use crate::output::{note, print_json, print_line};

/// Make a one-time token with which a host joins the herd
///
/// Prints it to stdout, once: only a hash of it is kept. On the host that joins, give it to
/// `pgherd agent --token-file`.
#[derive(Debug, Args)]
pub(crate) struct TokenArgs {
    /// Node that may use it [default: any in the herd file that has not joined]
    #[arg(value_name = "NODE")]
    node: Option<String>,
    /// How long it may be used
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = humantime::parse_duration)]
    valid_for: std::time::Duration,
}

pub(crate) async fn run(args: TokenArgs, global: &Global) -> Result<(), Failure> {
    let agents = Agents::find(global)?;
    let request = TokenRequest { node: args.node, valid_for_s: args.valid_for.as_secs() };
    let token = agents.call(async |client| client.token_create(&request).await).await?;
    if global.json {
        return print_json(&token);
    }
    print_line(&token.token)?;
    note(&format!("it can be used once, until {}", token.expires));
    Ok(())
}
