//! `pgherd operator`: certificates for people who run pgherd from other machines.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use pgherd_agent::pki;
use pgherd_api::join::OperatorRequest;

use crate::args::Global;
use crate::connect::{Agents, CLIENT_FILE, ClientFile};
use crate::failure::Failure;
use crate::output::{note, print_line};

/// Give people on other machines access to the herd
#[derive(Debug, Args)]
pub(crate) struct OperatorArgs {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Make a key, a certificate and a client.toml for an operator
    ///
    /// The key is made here and leaves this machine only if you carry it. Use it with
    /// `pgherd --dir DIR status`.
    Add {
        /// Name of the operator, which history shows beside what was asked for
        name: String,
        /// Directory to write the files into [default: client-NAME]
        #[arg(long, value_name = "DIR")]
        to: Option<PathBuf>,
        /// How long the certificate is valid
        #[arg(long, value_name = "TIME", default_value = "90d", value_parser = humantime::parse_duration)]
        valid_for: std::time::Duration,
    },
}

pub(crate) async fn run(args: OperatorArgs, global: &Global) -> Result<(), Failure> {
    let Action::Add { name, to, valid_for } = args.action;
    let dir = to.unwrap_or_else(|| PathBuf::from(format!("client-{name}")));
    if dir.join(CLIENT_FILE).exists() {
        return Err(Failure::usage(format!("{} is there already", dir.join(CLIENT_FILE).display()))
            .hint("--to names another directory"));
    }
    let agents = Agents::find(global)?;
    let key_failed = |error: &dyn std::fmt::Display| Failure::failed("cannot make a key").because(error);
    let key = pki::NewKey::generate().map_err(|error| key_failed(&error))?;
    let csr = key.request().map_err(|error| key_failed(&error))?;
    let request = OperatorRequest { name: name.clone(), csr, valid_for_s: valid_for.as_secs() };
    let answer = agents.call(async |client| client.operator_add(&request).await).await?;

    let file = ClientFile {
        herd: answer.herd,
        operator: name.clone(),
        urls: answer.urls,
        ca: "ca.pem".into(),
        certificate: "operator.pem".into(),
        key: "operator.key".into(),
    };
    std::fs::create_dir_all(&dir).map_err(|error| Failure::io("create", &dir, &error))?;
    let written = |result: Result<(), pki::FileError>| {
        result.map_err(|error| Failure::failed("the certificate was made and cannot be kept").because(error))
    };
    written(pki::write_private(&dir.join(&file.key), &key.expose_pem()))?;
    written(pki::write_public(&dir.join(&file.certificate), &answer.certificate))?;
    written(pki::write_public(&dir.join(&file.ca), &answer.ca))?;
    // Last, so that whoever finds it finds the others too.
    written(pki::write_public(&dir.join(CLIENT_FILE), &file.text()?))?;
    print_line(&dir.display().to_string())?;
    note(&format!("operator {name}, until {}; try: pgherd --dir {} status", answer.expires, dir.display()));
    Ok(())
}
