// Package etcd is the etcd backend of dchannel.
//
//	client, err := clientv3.New(clientv3.Config{
//		Endpoints:            []string{"https://etcd-0:2379", "https://etcd-1:2379", "https://etcd-2:2379"},
//		DialKeepAliveTime:    10 * time.Second, // see Reconnect
//		DialKeepAliveTimeout: 3 * time.Second,
//	})
//	…
//	orders := dchannel.New("orders", etcd.New(client))
//
// # Delivery
//
// A channel is one head key and one key for each frame of messages:
//
//	<namespace>/id                           random, stands for the store's memory
//	<namespace>/head/<channel>               epoch, sequence number and ID of the last entry
//	<namespace>/log/<channel>/<epoch>-<seq>  one entry, in the text form of docs/wire.md
//
// In names, "/" is written %2F and "%" is written %25. An append is one transaction: if the
// head is what this process believes, put the entry and the new head, and now and then delete
// the oldest entries; if not, return the head. What Publish has accepted is therefore in the
// logs of a majority of the cluster, on disk.
//
// All channels of a namespace are pushed by one watch for each Backend, opened by the first
// subscription and closed with the last. It receives the traffic of the whole namespace, also
// of channels that nobody here listens to: put groups of channels that have nothing to do with
// each other into namespaces of their own. The watch goes on from where it was after a broken
// connection; catch-up reads keys, never the revision history, so the cluster may be compacted
// at any time, and nothing is lost by it.
//
// # Close marker
//
// The marker is the log's last entry. Head and marker are put under a lease of the time that
// the marker is to be kept; messages go when their own time is over.
//
// # Locks
//
// [Backend] is a [dchannel.Locker]. A lock is up to three kinds of keys; values are JSON:
//
//	<namespace>/lock/<channel>/hold          there while it is held, on a lease of its own
//	<namespace>/lock/<channel>/record        the newest generation, and how the last ones ended
//	<namespace>/lock/<channel>/line/<token>  a waiter, on a lease of the time that it asked for
//
// Promised: every change is one transaction on the state that it rests on, so there is one holder
// by the server's clock, every generation ends once, and a call that is repeated does nothing twice. The
// server ends a hold when its lease is over, whoever is alive; a generation whose hold is gone and that nobody
// ended has expired, which needs no writing down. Acquire checks in its transaction that the log has
// not ended. Fences are the last one and 1, or microseconds since 1970 by the acquiring process's clock if
// that is more, so they grow over a loss of the data directory or [Backend.Remove] too, unless the next
// holder's clock is behind the last one's by more than the time in between, and its process had
// not seen that fence. The record stays for a day after the generation's end at least.
//
// Lines are fair: they are ordered by when the waiters' keys were made, and releasing or forcing begins the first
// one's generation in the same transaction. A hold that expires is claimed by the first in line when it
// calls next. A waiter that died keeps its place, or is handed the lock, for the time that it asked for.
//
// Times are whole seconds and what the server grants, 2 at least with its usual election timeout.
// Remaining is rounded up from the server's whole seconds: it may be up to 1 s too long, and is never 0 while
// the lock is held. The server deletes what has expired up to a second late. After a change of leader
// it counts all leases anew, so the time left can grow, but never shrinks.
//
// Not promised: that a holder that was paused longer than its time knows it. What the lock protects has to
// check the fence, on reading and on writing. Who can write to the prefix can end any lock.
//
// A successful Acquire takes three trips and a lease grant, a refused one two, a Release two. The events
// of locks come by the same watch as those of logs. It is not filtered, so that it receives the deletions of
// retention too.
//
// # Reconnect
//
// The client reconnects by itself. A linearizable read every few seconds ([WithProbe]), and a
// progress request on the watch, find what the client does not: a connection that is half open,
// a watch that has stalled, a server whose data directory was lost (its revision went back, or
// the namespace's id is another). While they fail, subscriptions are interrupted, and publishing
// waits for its context.
//
// gRPC sends no keep-alives unless told to: set DialKeepAliveTime (gRPC takes 10 s at least) and
// DialKeepAliveTimeout in the client's configuration, so that a half-open connection ends by
// itself. Where they are not set, a probe that has timed out makes the client connect anew, by
// setting its endpoints to none and back; what is under way on the old connection is not
// broken off by that.
//
// # Limits
//
// A frame is limited by the server's --max-request-bytes, 1.5 MiB unless set; [Backend.MaxFrame]
// stays 16 KiB below this default. Lease times are whole seconds, so messages and markers live up
// to a quarter and two seconds longer than asked for, and longer again after a change of leader, when etcd
// starts leases anew. Entries that different processes appended may expire out of order, each after its
// full time. [dchannel.Entry].Time is by the appending process's clock, since etcd shows none.
//
// etcd keeps every revision until it is compacted, and compacts nothing unless told to: run it
// with --auto-compaction-mode=periodic --auto-compaction-retention=10m, say, and allow for the database's
// size in --quota-backend-bytes (2 GiB unless set): about what is written during twice that
// time, plus what retention keeps. A full database refuses all writes ([dchannel.ErrRefused]) until
// it is compacted, defragmented and disarmed. The library never compacts: the history is not
// its own.
//
// Only the documented prefix is used. The least that a user needs is, with etcdctl:
//
//	etcdctl role grant-permission app readwrite --prefix=true dchannel/
//
// # Cluster
//
// All reads are linearizable and all writes go through consensus: a change of leader or the loss
// of a minority loses nothing. Requests ask for a leader, so that a member that is cut off from
// the others says so at once. The prefixing wrappers of clientv3/namespace are not looked at: put
// the prefix into [WithNamespace], which may contain slashes.
//
// # Server versions
//
// etcd 3.5.8 or newer: older ones can answer a progress request before the events it stands for
// (https://github.com/etcd-io/etcd/issues/15220). Tested with 3.7.
package etcd

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/dchannel/dchannel"
)

// maxFrame is the server's default limit of a request, less room for the keys (a name of 255
// bytes may take 765 in a key, and a transaction holds up to nine keys) and the entry's header.
const maxFrame = 3<<19 - 16<<10

var (
	_ dchannel.Backend      = (*Backend)(nil)
	_ dchannel.FrameLimiter = (*Backend)(nil)
	_ dchannel.Locker       = (*Backend)(nil)
)

// Backend keeps channels in etcd. Make it with [New]. Its methods may be called concurrently.
type Backend struct {
	client *clientv3.Client
	kv     clientv3.KV
	opts   options
	keys   keyspace
	leases leases
	broken error // what New found wrong; every call returns it
	log    *slog.Logger

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	wg     sync.WaitGroup // of everything that Backend started

	memory  memory       // what this process knows of the store's identity
	renewed atomic.Int64 // the lease that the namespace's ID was last put under
	tails   tails        // what this process believes the channels' heads to be
	fence   fences

	mu     sync.Mutex
	closed bool
	push   *push // nil while nothing is subscribed
}

// New returns a backend that keeps its channels in the etcd cluster of client. It sends nothing. The
// client stays the caller's: it is never closed, and other uses of it are not disturbed. An
// option that cannot be used is reported by the first call, as [dchannel.ErrInvalidOption].
func New(client *clientv3.Client, opts ...Option) *Backend {
	b := &Backend{client: client, opts: defaults()}
	b.ctx, b.cancel = context.WithCancel(context.Background())
	for _, o := range opts {
		o(&b.opts)
	}
	if b.broken = b.opts.check(); b.broken == nil && client == nil {
		b.broken = fmt.Errorf("%w: client is nil, want an etcd client", dchannel.ErrInvalidOption)
	}
	if b.broken != nil {
		return b
	}
	b.kv = clientv3.NewKV(client)
	b.log = b.opts.logger
	b.keys = newKeyspace(b.opts.namespace)
	b.tails.init()
	b.leases.init(b)
	return b
}

// MaxFrame returns the largest frame in bytes that a server with the default
// --max-request-bytes takes.
func (b *Backend) MaxFrame() int { return maxFrame }

// Close ends all subscriptions and waits for the goroutines of this backend, not for the server.
// The leases of what was published stay: they end by themselves, when the messages' time is
// over.
func (b *Backend) Close() error {
	b.mu.Lock()
	p := b.push
	b.push = nil
	first := !b.closed
	b.closed = true
	b.mu.Unlock()
	b.cancel()
	if p != nil {
		p.cancel()
	}
	b.wg.Wait()
	if first && p != nil {
		p.fail(dchannel.ErrBackendClosed)
	}
	return nil
}

// spawn runs f on a goroutine that Close waits for, or says that it is too late.
func (b *Backend) spawn(f func()) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return false
	}
	b.wg.Go(f)
	return true
}

// begin checks that the backend can be used, and returns a context that ends with ctx or with
// the backend. The function releases it.
func (b *Backend) begin(ctx context.Context) (context.Context, func(), error) {
	if b.broken != nil {
		return nil, nil, b.broken
	}
	if b.ctx.Err() != nil {
		return nil, nil, dchannel.ErrBackendClosed
	}
	if err := ctx.Err(); err != nil {
		return nil, nil, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(b.ctx, func() { cancel(dchannel.ErrBackendClosed) })
	// A member without a leader refuses at once instead of letting the request wait for one.
	return clientv3.WithRequireLeader(ctx), func() { stop(); cancel(nil) }, nil
}

// now is the time of an entry, in milliseconds. etcd shows no clock of its own.
func now() int64 { return time.Now().UnixMilli() }
