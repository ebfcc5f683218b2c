//! Whole clusters: real etcd, real controllers and agents, real QEMU. One program, so that it is linked once and so that what waits in
//! one test leaves the processors to another; how many clusters there are at once is bounded by `harness::slots`.

mod agent_dies;
mod bad_calls;
mod bad_input;
mod bridges;
mod chaos;
mod clone;
mod cloud_init;
mod control_plane_dies;
mod dev;
mod disks;
mod drain;
mod failover_off;
mod host_dies;
mod hotplug;
mod images_upload;
mod images_web;
mod keeper_dies;
mod migration;
mod migration_disks;
mod migration_faults;
mod network_pool;
mod pause;
mod requests;
mod scheduling;
mod screen;
mod third_party;
mod vm_runs;
