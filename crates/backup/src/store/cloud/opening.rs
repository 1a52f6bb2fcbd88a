//! How one comes into a bucket of S3, of Google Cloud Storage (`gs://`) or a container of Azure Blob Storage (`azure://`).
//!
//! What is not given comes from nowhere else: the environment of a process is no place for what a herd file decides. Without
//! a key the machine's own role is used, which the library asks the cloud for. For Google it looks before that whether
//! `gcloud` has left credentials in the home directory of the user; nothing turns that off.
//!
//! Left out: what is done there. Hazard: secrets. The library's errors say what stands in a key that it cannot read, so a key is looked at here
//! first, and nothing that is said of it repeats any of it.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use object_store::ClientOptions;
use object_store::aws::{AmazonS3Builder, Checksum};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::path::Path;
use object_store::prefix::PrefixStore;
use object_store::{ObjectStore, RetryConfig};

use super::Source;

/// For how long a request is tried again. Below the five minutes for which a signature is good.
const RETRY_FOR: Duration = Duration::from_secs(60);
/// One request: the largest object over a line of 10 MB/s.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(110);

/// How to come into an S3 bucket.
#[derive(Clone, Default)]
pub struct Credentials {
    pub access_key: Option<String>,
    pub secret_key: Option<String>,
    pub region: Option<String>,
    /// For stores that are not Amazon's: `https://host:port`.
    pub endpoint: Option<String>,
    /// Whether an endpoint may be spoken to without TLS.
    pub allow_http: bool,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("region", &self.region)
            .field("endpoint", &self.endpoint)
            .finish_non_exhaustive()
    }
}

/// How to come into a bucket of Google Cloud Storage.
#[derive(Clone, Default)]
pub struct GcsCredentials {
    /// The JSON that Google gives out as the key of a service account.
    pub service_account: Option<String>,
    pub endpoint: Option<String>,
    pub allow_http: bool,
}

impl fmt::Debug for GcsCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GcsCredentials").field("endpoint", &self.endpoint).finish_non_exhaustive()
    }
}

/// How to come into a container of Azure Blob Storage.
#[derive(Clone)]
pub struct AzureCredentials {
    /// The storage account that the container belongs to.
    pub account: String,
    pub key: Option<AzureKey>,
    pub endpoint: Option<String>,
    pub allow_http: bool,
}

/// What a storage account lets in.
#[derive(Clone)]
pub enum AzureKey {
    /// One of the account's two keys, which may do everything.
    Account(String),
    /// A shared access signature: what it may, and until when, stands in it.
    Sas(String),
}

impl fmt::Debug for AzureCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AzureCredentials")
            .field("account", &self.account)
            .field("endpoint", &self.endpoint)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for AzureKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            AzureKey::Account(_) => "Account",
            AzureKey::Sas(_) => "Sas",
        })
    }
}

pub(in crate::store) fn s3(url: &str, credentials: Credentials) -> Result<Arc<dyn ObjectStore>, Source> {
    let (bucket, folder) = parts(url, "s3://")?;
    let mut builder = AmazonS3Builder::new()
        .with_bucket_name(bucket)
        .with_region(credentials.region.as_deref().unwrap_or("us-east-1"))
        .with_allow_http(credentials.allow_http)
        // A bucket with Object Lock takes nothing without one.
        .with_checksum_algorithm(Checksum::SHA256)
        // One request for each object is what every store has; deletions are rare.
        .with_disable_bulk_delete(true)
        .with_client_options(client(credentials.allow_http))
        .with_retry(retry());
    if let Some(endpoint) = credentials.endpoint {
        builder = builder.with_endpoint(endpoint);
    }
    if let (Some(access), Some(secret)) = (credentials.access_key, credentials.secret_key) {
        builder = builder.with_access_key_id(access).with_secret_access_key(secret);
    }
    Ok(below(builder.build()?, folder))
}

pub(in crate::store) fn gcs(url: &str, credentials: GcsCredentials) -> Result<Arc<dyn ObjectStore>, Source> {
    let (bucket, folder) = parts(url, "gs://")?;
    let mut builder = GoogleCloudStorageBuilder::new()
        .with_bucket_name(bucket)
        .with_client_options(client(credentials.allow_http))
        .with_retry(retry());
    if let Some(endpoint) = &credentials.endpoint {
        builder = builder.with_base_url(endpoint.trim_end_matches('/'));
    }
    if let Some(json) = &credentials.service_account {
        builder = builder.with_service_account_key(service_account(json)?);
    }
    Ok(below(builder.build()?, folder))
}

pub(in crate::store) fn azure(
    url: &str,
    credentials: AzureCredentials,
) -> Result<Arc<dyn ObjectStore>, Source> {
    let (container, folder) = parts(url, "azure://")?;
    let mut builder = MicrosoftAzureBuilder::new()
        .with_account(credentials.account)
        .with_container_name(container)
        .with_client_options(client(credentials.allow_http))
        .with_retry(retry());
    if let Some(endpoint) = &credentials.endpoint {
        builder = builder.with_endpoint(endpoint.trim_end_matches('/').to_owned());
    }
    builder = match credentials.key {
        Some(AzureKey::Account(key)) if is_base64(&key) => builder.with_access_key(key),
        Some(AzureKey::Account(_)) => return Err("the key of the account is not in base64".into()),
        Some(AzureKey::Sas(token)) if token.contains("sig=") => {
            builder.with_config(AzureConfigKey::SasKey, token)
        }
        Some(AzureKey::Sas(_)) => return Err("the SAS token has no signature (sig=…)".into()),
        None => builder,
    };
    Ok(below(builder.build()?, folder))
}

/// Bucket and folder of an address.
fn parts<'a>(url: &'a str, scheme: &str) -> Result<(&'a str, Path), Source> {
    let rest = url.strip_prefix(scheme).unwrap_or_default();
    let (bucket, folder) = rest.split_once('/').unwrap_or((rest, ""));
    if bucket.is_empty() {
        return Err(format!("it is not an address such as {scheme}bucket/folder").into());
    }
    Ok((bucket, Path::parse(folder.trim_end_matches('/'))?))
}

fn below(bucket: impl ObjectStore, folder: Path) -> Arc<dyn ObjectStore> {
    match folder.as_ref() {
        "" => Arc::new(bucket),
        _ => Arc::new(PrefixStore::new(bucket, folder)),
    }
}

fn retry() -> RetryConfig {
    RetryConfig { retry_timeout: RETRY_FOR, ..RetryConfig::default() }
}

fn client(allow_http: bool) -> ClientOptions {
    ClientOptions::new().with_timeout(REQUEST_TIMEOUT).with_allow_http(allow_http)
}

/// What of the file is needed. The library would also take from it where the store is, and that nothing is to be signed.
fn service_account(json: &str) -> Result<String, Source> {
    let value: serde_json::Value = serde_json::from_str(json).map_err(|error| {
        format!("the key of the service account is no JSON, at its line {}", error.line())
    })?;
    let field = |name: &str| {
        let missing = || format!("the file has no {name}: it is not the key of a service account");
        value.get(name).and_then(serde_json::Value::as_str).ok_or_else(missing)
    };
    let (key, id, email) = (field("private_key")?, field("private_key_id")?, field("client_email")?);
    let is_pem = ["PRIVATE KEY", "RSA PRIVATE KEY"].iter().any(|kind| {
        let body = key.trim().strip_prefix(&format!("-----BEGIN {kind}-----\n"));
        let body = body.and_then(|body| body.strip_suffix(&format!("\n-----END {kind}-----")));
        body.is_some_and(|body| body.lines().all(|line| is_base64(line.trim_end())))
    });
    if !is_pem {
        return Err("private_key of the service account is no key in PEM".into());
    }
    Ok(serde_json::json!({ "private_key": key, "private_key_id": id, "client_email": email }).to_string())
}

fn is_base64(text: &str) -> bool {
    let digits = text.trim_end_matches('=');
    !digits.is_empty()
        && text.len().is_multiple_of(4)
        && text.len() - digits.len() <= 2
        && digits.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'+' || byte == b'/')
}
