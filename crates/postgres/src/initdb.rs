//! The first data directory of a cluster.
//!
//! Checksums, UTF-8, a locale that is the same on every host, and no line that trusts anybody. Leaves out: who may
//! run it. Hazard: two nodes that both run it are two clusters; the store's compare-and-set prevents that.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use crate::conf::{self, ConfError, Settings};
use crate::durable;
use crate::error::{Error, Result, blocking, within};
use crate::hba::{self, Gate, HbaError, Rules};
use crate::instance::Instance;
use crate::making::{Making, MakingError};
use crate::roles;
use crate::secret::Secret;

const FILES: Duration = Duration::from_secs(60);

/// C.UTF-8 sorts by code point and is the same everywhere; glibc's other locales change their order between
/// versions and break indexes on a standby with another one.
const LOCALE: &str = "C.UTF-8";
const PLAIN_LOCALE: &str = "C";

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InitdbError {
    #[error(transparent)]
    Making(#[from] MakingError),
    #[error(transparent)]
    Conf(#[from] ConfError),
    #[error(transparent)]
    Hba(#[from] HbaError),
    #[error(transparent)]
    Other(#[from] Error),
}

/// Makes a data directory with our configuration, the gate closed, and `standby.signal` in it: it becomes a primary
/// by a promotion like any other. `superuser` becomes the password of `postgres`.
pub async fn initdb(
    instance: &Instance,
    settings: &Settings,
    superuser: &Secret,
    deadline: Duration,
) -> Result<(), InitdbError> {
    let making = {
        let instance = instance.clone();
        blocking("making a data directory", FILES, move || Making::begin(&instance)).await?
    };
    let pwfile = instance.private_dir.join("initdb.password");
    {
        let (pwfile, text) = (pwfile.clone(), format!("{}\n", superuser.reveal()));
        blocking("handing over a password", FILES, move || {
            durable::write(&pwfile, text.as_bytes(), durable::PRIVATE)
        })
        .await?;
    }
    let run = run(instance, &making, &pwfile, deadline).await;
    blocking("removing a password", FILES, move || durable::remove(&pwfile)).await?;
    run?;

    let settings = Settings { data_checksums: true, ..settings.clone() };
    conf::write_into(instance, &settings, &making.data_dir).await?;
    hba::write_into(instance, Gate::Closed, &Rules::default(), &making.data_dir).await?;
    blocking("finishing a data directory", FILES, move || {
        durable::touch(&making.data_dir.join("standby.signal"))?;
        making.finish()
    })
    .await?;
    Ok(())
}

async fn run(instance: &Instance, making: &Making, pwfile: &Path, deadline: Duration) -> Result<()> {
    match try_locale(instance, making, pwfile, LOCALE, deadline).await {
        Err(Error::Program { output, .. }) if output.contains("invalid locale name") => {
            try_locale(instance, making, pwfile, PLAIN_LOCALE, deadline).await
        }
        other => other,
    }
}

async fn try_locale(
    instance: &Instance,
    making: &Making,
    pwfile: &Path,
    locale: &str,
    deadline: Duration,
) -> Result<()> {
    let program = instance.installation.program("initdb");
    let mut command = tokio::process::Command::new(&program);
    command
        .arg("-D")
        .arg(&making.data_dir)
        .args(["-U", roles::SUPERUSER, "--encoding=UTF8", "--data-checksums", "--no-instructions"])
        .args(["--auth-local=peer", "--auth-host=scram-sha-256"])
        .arg(format!("--locale={locale}"))
        .arg(format!("--pwfile={}", pwfile.display()))
        .env_clear()
        .env("PATH", "/usr/local/bin:/usr/bin:/bin")
        .env("LANG", "C.UTF-8")
        .stdin(Stdio::null())
        .kill_on_drop(true);
    if let Some(wal_dir) = &making.wal_dir {
        command.arg(format!("--waldir={}", wal_dir.display()));
    }
    let output = within("running initdb", deadline, async {
        command.output().await.map_err(Error::io("run", &program))
    })
    .await?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(Error::Program { program: "initdb", status: output.status.to_string(), output: said })
}
