//! A store that somebody else has, who answers as [`Store`](super::Store) itself does.
//!
//! Left out: how it is asked. Hazard: an answer that is lost. What is not known to have worked has to be [`Failure::Failed`], and never
//! [`Failure::Absent`].

use std::ops::Range;

use bytes::Bytes;
use futures_util::future::BoxFuture;

use super::{Failure, Listed, Page, Put, Source};
use crate::name::Name;

pub type RemoteAnswer<'a, T> = BoxFuture<'a, Result<T, (Failure, Source)>>;

/// The operations of a store.
pub trait Remote: Send + Sync {
    fn put<'a>(&'a self, name: &'a Name, bytes: Bytes) -> RemoteAnswer<'a, Put>;
    fn read<'a>(&'a self, name: &'a Name, limit: u64) -> RemoteAnswer<'a, Bytes>;
    fn read_range<'a>(&'a self, name: &'a Name, range: Range<u64>) -> RemoteAnswer<'a, Bytes>;
    fn head<'a>(&'a self, name: &'a Name) -> RemoteAnswer<'a, Listed>;
    fn list<'a>(&'a self, prefix: &'a str, after: Option<&'a Name>, limit: usize) -> RemoteAnswer<'a, Page>;
    fn delete<'a>(&'a self, name: &'a Name) -> RemoteAnswer<'a, ()>;
    fn sweep(&self) -> RemoteAnswer<'_, usize>;
}
