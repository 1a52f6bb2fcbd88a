//! `pgherd proxy`: the address that clients connect to, and how another host gets one.

use std::ffi::OsString;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use pgherd_agent::files::proxy::{ProxyFile, agent_url};
use pgherd_agent::pki;
use pgherd_agent::proxy::{self, FILE, Options, Order, PKI_DIR, Start};
use pgherd_api::join::ProxyRequest;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc::{self, UnboundedReceiver};

use crate::args::Global;
use crate::connect::Agents;
use crate::failure::Failure;
use crate::output::{self, note, print_line};

/// Run a connection proxy: one address that leads to the primary, wherever it is
///
/// Reads proxy.toml and the certificate in the directory, which `pgherd proxy add` makes. `pgherd up` runs one
/// of its own. It knows no passwords: clients prove themselves against what PostgreSQL stores.
///
/// SIGTERM and SIGINT let transactions end, for five seconds, and end the proxy; a second one ends it at once. SIGUSR1 lets
/// nobody in and ends it when its last client has left. SIGUSR2 starts the program again and hands over to it, as
/// --take-over does.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct ProxyArgs {
    /// Take over from the process that runs this proxy, without dropping its clients
    ///
    /// For an upgrade or a restart. The process that runs goes on with the clients that it has, and ends when the last
    /// one has left. With =if-running it starts by itself where none runs
    #[arg(long, value_name = "WHEN", num_args = 0..=1, require_equals = true, default_missing_value = "now")]
    take_over: Option<TakeOver>,
    /// How long the clients of the process that is taken over may stay [default: as long as they like]
    #[arg(long, value_name = "TIME", requires = "take_over", value_parser = humantime::parse_duration)]
    clients_within: Option<Duration>,
    #[command(subcommand)]
    action: Option<Action>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum TakeOver {
    Now,
    IfRunning,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Make the directory of a proxy: a key, a certificate and a proxy.toml
    ///
    /// The key is made here and leaves this machine only if you carry it. Run it with `pgherd proxy --dir DIR`.
    Add {
        /// Name of the proxy, as names of nodes are
        name: String,
        /// Directory to write the files into [default: proxy-NAME]
        #[arg(long, value_name = "DIR")]
        to: Option<PathBuf>,
        /// Host name or IP address by which clients reach it, for its certificate; may be repeated
        #[arg(long, value_name = "HOST", required = true)]
        host: Vec<String>,
        /// Address to listen on
        #[arg(long, value_name = "ADDRESS", default_value = "0.0.0.0")]
        listen: IpAddr,
        /// How long the certificate is valid; the proxy renews it in time
        #[arg(long, value_name = "TIME", default_value = "365d", value_parser = humantime::parse_duration)]
        valid_for: Duration,
    },
}

pub(crate) fn run(args: ProxyArgs, global: &Global) -> Result<(), Failure> {
    match args.action {
        Some(Action::Add { name, to, host, listen, valid_for }) => {
            super::block_on(global, add(name, to, host, listen, valid_for, global))
        }
        None => serve(args.take_over, args.clients_within, global),
    }
}

fn serve(
    take_over: Option<TakeOver>,
    clients_within: Option<Duration>,
    global: &Global,
) -> Result<(), Failure> {
    if global.url.is_some() || global.cluster.is_some() {
        return Err(Failure::usage("--url and --cluster mean nothing to a proxy that runs")
            .hint(format!("its {FILE} names the agents and the cluster")));
    }
    output::trace_as_log(global.verbose);
    let dir = global.dir()?;
    // Clients are served by threads of their own; this one only listens to agents.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Failure::failed("cannot start a runtime").because(error))?;
    let start = match take_over {
        None => Start::Alone,
        Some(TakeOver::Now) => Start::TakesOver,
        Some(TakeOver::IfRunning) => Start::Either,
    };
    // Looked up now: by the time that it is needed, another program may lie there.
    let program = std::env::current_exe()
        .map_err(|error| Failure::failed("cannot tell which program this is").because(error))?;
    let options = Options { start, clients_within, successor: (program, successor_arguments()) };
    runtime.block_on(async { proxy::run(&dir, &options, orders()?).await.map_err(Failure::from) })
}

/// Those of this process, and that it takes over.
fn successor_arguments() -> Vec<OsString> {
    let takes_over =
        |argument: &OsString| argument.to_str().is_some_and(|text| text.starts_with("--take-over"));
    let mut arguments: Vec<OsString> =
        std::env::args_os().skip(1).filter(|argument| !takes_over(argument)).collect();
    arguments.push("--take-over".into());
    arguments
}

/// What signals say.
fn orders() -> Result<UnboundedReceiver<Order>, Failure> {
    let (sender, orders) = mpsc::unbounded_channel();
    for (kind, order) in [
        (SignalKind::terminate(), Order::End),
        (SignalKind::interrupt(), Order::End),
        (SignalKind::user_defined1(), Order::EndAfterClients),
        (SignalKind::user_defined2(), Order::Succeed),
    ] {
        let mut signals =
            signal(kind).map_err(|error| Failure::failed("cannot wait for signals").because(error))?;
        let sender = sender.clone();
        tokio::spawn(async move { while signals.recv().await.is_some() && sender.send(order).is_ok() {} });
    }
    Ok(orders)
}

async fn add(
    name: String,
    to: Option<PathBuf>,
    hosts: Vec<String>,
    listen: IpAddr,
    valid_for: Duration,
    global: &Global,
) -> Result<(), Failure> {
    let dir = to.unwrap_or_else(|| PathBuf::from(format!("proxy-{name}")));
    if dir.join(FILE).exists() {
        return Err(Failure::usage(format!("{} is there already", dir.join(FILE).display()))
            .hint("--to names another directory"));
    }
    let agents = Agents::find(global)?;
    let status = agents.call(async |client| client.status().await).await?;
    let cluster = super::cluster(&status, global.cluster.as_deref())?;
    let key_failed = |error: &dyn std::fmt::Display| Failure::failed("cannot make a key").because(error);
    let key = pki::NewKey::generate().map_err(|error| key_failed(&error))?;
    let csr = key.request().map_err(|error| key_failed(&error))?;
    let request = ProxyRequest { name: name.clone(), csr, hosts, valid_for_s: valid_for.as_secs() };
    let answer = agents.call(async |client| client.proxy_add(&request).await).await?;

    let pki_dir = dir.join(PKI_DIR);
    std::fs::create_dir_all(&pki_dir).map_err(|error| Failure::io("create", &pki_dir, &error))?;
    let not_kept = |error: &dyn std::fmt::Display| {
        Failure::failed("the certificate was made and cannot be kept").because(error)
    };
    pki::Credentials::save(&pki_dir, &answer.ca, &answer.certificate, &key)
        .map_err(|error| not_kept(&error))?;
    let named = |text: &str| text.parse().map_err(|_| not_kept(&format!("\"{text}\" is no name")));
    let file = ProxyFile {
        name: named(&name)?,
        cluster: named(&cluster.name)?,
        herd: Some(answer.herd),
        listen,
        port: None,
        read_port: None,
        agents: answer.urls.iter().filter_map(|url| agent_url(url)).collect(),
    };
    // Last, so that whoever finds it finds the others too.
    pki::write_public(&dir.join(FILE), &file.write()).map_err(|error| not_kept(&error))?;
    print_line(&dir.display().to_string())?;
    note(&format!("proxy {name}, until {}; run: pgherd proxy --dir {}", answer.expires, dir.display()));
    Ok(())
}
