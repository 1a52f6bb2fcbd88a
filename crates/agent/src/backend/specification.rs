//! The specification: read, compare, replace.

use std::collections::BTreeMap;

use pgherd_api::proxy::{OptionValue, Pool, ProxyQuery, ProxySettings, Tls};
use pgherd_api::spec::{Applied, ApplyRequest, Impact, Plan, PlanRequest, PlannedChange, Spec};
use pgherd_api::{Code, Error};
use pgherd_core::spec::{self, HerdSpec, ProxyOption, plan};

use super::joining::urls;
use super::{AgentBackend, WITHIN, cluster_of, local_view, refused};
use crate::agreed::{self, AgreedError, StoredSpec};
use crate::files::herd;
use crate::http::backend::Answer;
use crate::pki::OperatorName;

impl AgentBackend {
    pub(super) async fn read_spec(&self) -> Answer<Spec> {
        let (spec, generation) = self.stored_spec()?;
        Ok(Spec { generation, text: herd::write(&spec) })
    }

    pub(super) async fn make_plan(&self, request: PlanRequest) -> Answer<Plan> {
        let (old, generation) = self.stored_spec()?;
        let new = parse(&request.text, request.file.as_deref())?;
        let changes = self.compare(&old, &new)?;
        Ok(Plan { generation, changes })
    }

    pub(super) async fn apply_spec(&self, operator: &OperatorName, request: ApplyRequest) -> Answer<Applied> {
        let (old, generation) = self.stored_spec()?;
        if generation != request.generation {
            return Err(Error::of(Code::GenerationStale));
        }
        let new = parse(&request.text, request.file.as_deref())?;
        let changes = self.compare(&old, &new)?;
        let greatest = changes.iter().map(|change| change.impact).max().unwrap_or(Impact::None);
        if greatest > request.accept {
            return Err(Error::of(Code::ImpactNotAccepted));
        }
        if changes.is_empty() {
            return Ok(Applied { generation, changes });
        }
        let stored =
            agreed::update(&self.store, agreed::SPEC, WITHIN, |seen: Option<StoredSpec>| match seen {
                Some(seen) if seen.generation == generation => {
                    Ok(StoredSpec { generation: generation + 1, spec: new.clone() })
                }
                _ => Err(ApplyError::Stale),
            });
        let stored = stored.await.map_err(|error| match error {
            ApplyError::Stale => Error::of(Code::GenerationStale),
            ApplyError::Agreed(error) => refused(&error),
        })?;
        tracing::info!(%operator, generation = stored.generation, changes = changes.len(), "a herd file was applied");
        Ok(Applied { generation: stored.generation, changes })
    }

    /// What the specification says to a proxy.
    pub(super) fn proxy_settings(&self, query: &ProxyQuery) -> Answer<ProxySettings> {
        let (spec, generation) = self.stored_spec()?;
        let cluster = cluster_of(&spec, query.cluster.as_deref())?;
        let proxy = cluster.proxy.clone().unwrap_or_default();
        let by_name = |pools: BTreeMap<String, spec::Pool>| {
            pools.into_iter().map(|(name, pool)| (name, pool_of(pool))).collect()
        };
        let named = |option: &ProxyOption| (option.name().to_owned(), value_of(proxy.option(*option)));
        let options = ProxyOption::ALL.iter().map(named).collect();
        Ok(ProxySettings {
            herd: spec.name.to_string(),
            cluster: cluster.name.to_string(),
            generation,
            port: proxy.port,
            read_port: proxy.read_port,
            pool: pool_of(proxy.pool),
            pool_size: proxy.pool_size,
            databases: by_name(proxy.databases),
            users: by_name(proxy.users),
            options,
            console_admins: proxy.console_admins,
            console_readers: proxy.console_readers,
            metrics_listen: proxy.metrics_listen,
            tls: Tls {
                server_mode: proxy.tls.server_mode.to_string(),
                client_mode: proxy.tls.client_mode.to_string(),
                client_cert_file: proxy.tls.client_cert_file,
                client_key_file: proxy.tls.client_key_file,
                client_ca_file: proxy.tls.client_ca_file,
                certificate_users: proxy.tls.certificate_users,
            },
            hba: cluster.postgres.hba.clone(),
            ident: cluster.postgres.ident.clone(),
            agents: urls(&spec),
        })
    }

    /// The changes, or what of them is refused, all at once.
    fn compare(&self, old: &HerdSpec, new: &HerdSpec) -> Answer<Vec<PlannedChange>> {
        let view = local_view(&self.store);
        let planned = plan::plan(old, new, |cluster| {
            let (record, _) = agreed::record(&view, cluster).ok()?;
            record.holder().map(|holder| holder.node.clone())
        });
        if !planned.refusals.is_empty() {
            let refusals = planned.refusals.iter();
            let whys: Vec<String> =
                refusals.clone().map(|refusal| format!("{}: {}", refusal.path, refusal.why)).collect();
            let hints: Vec<String> = refusals.map(|refusal| refusal.why.hint()).collect();
            return Err(Error::new(Code::SpecInvalid, "the herd file changes what cannot be changed")
                .because(whys.join("; "))
                .hinting(hints.join("; ")));
        }
        let changes = planned.changes.into_iter().map(|change| PlannedChange {
            impact: impact(change.effect.impact()),
            action: change.effect.to_string(),
            path: change.path,
            from: change.from,
            to: change.to,
        });
        Ok(changes.collect())
    }
}

#[derive(Debug)]
enum ApplyError {
    Stale,
    Agreed(AgreedError),
}

impl From<AgreedError> for ApplyError {
    fn from(error: AgreedError) -> ApplyError {
        ApplyError::Agreed(error)
    }
}

fn parse(text: &str, file: Option<&str>) -> Answer<HerdSpec> {
    match herd::read(file.unwrap_or("herd.toml"), text) {
        Ok(read) => Ok(read.spec),
        Err(findings) => Err(Error::of(Code::SpecInvalid).because(findings)),
    }
}

fn value_of(value: spec::OptionValue) -> OptionValue {
    match value {
        spec::OptionValue::Switch(on) => OptionValue::Switch(on),
        spec::OptionValue::Whole(number) => OptionValue::Whole(number),
        spec::OptionValue::Time { ms } => OptionValue::Time { ms },
    }
}

fn pool_of(pool: spec::Pool) -> Pool {
    match pool {
        spec::Pool::Session => Pool::Session,
        spec::Pool::Transaction => Pool::Transaction,
        spec::Pool::Statement => Pool::Statement,
    }
}

fn impact(impact: plan::Impact) -> Impact {
    match impact {
        plan::Impact::None => Impact::None,
        plan::Impact::Reload => Impact::Reload,
        plan::Impact::Restart => Impact::Restart,
        plan::Impact::Switchover => Impact::Switchover,
        plan::Impact::Clone => Impact::Clone,
        plan::Impact::Destroy => Impact::Destroy,
    }
}
