package etcd

import (
	"context"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// leases hands out rolling leases: one is granted for a quarter longer than something has to
// live, serves all that is written during that quarter, and is then replaced by the next. So a
// process holds about five leases for each lifetime in use, however many channels there are (a
// lease for each channel would be a consensus round each, and 10,000 leases took 14 s to go). None
// is ever kept alive or revoked: all end by themselves, and what is under them goes with them.
type leases struct {
	b  *Backend
	mu sync.Mutex
	of map[time.Duration]*rolling
}

type rolling struct {
	id    clientv3.LeaseID
	until time.Time // with a monotonic reading; also compared by wall time
	grant *grant    // under way, or nil
}

type grant struct {
	done chan struct{}
	id   clientv3.LeaseID
	err  error
}

func (l *leases) init(b *Backend) {
	l.b = b
	l.of = make(map[time.Duration]*rolling)
}

// get returns a lease that lives for at least d from now. It waits for the server only when one has to
// be granted.
func (l *leases) get(ctx context.Context, d time.Duration) (clientv3.LeaseID, error) {
	d = coarse(d)
	l.mu.Lock()
	r := l.of[d]
	if r == nil {
		r = &rolling{}
		l.of[d] = r
	}
	if r.id != 0 && fresh(r.until) {
		defer l.mu.Unlock()
		return r.id, nil
	}
	g := r.grant
	if g == nil {
		g = &grant{done: make(chan struct{})}
		if !l.b.spawn(func() { l.run(r, g, d) }) {
			l.mu.Unlock()
			return 0, context.Canceled
		}
		r.grant = g
	}
	l.mu.Unlock()
	select {
	case <-g.done:
		return g.id, g.err
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}

// run asks for a lease on behalf of everyone who waits for it, so on none of their contexts.
func (l *leases) run(r *rolling, g *grant, d time.Duration) {
	ctx, cancel := context.WithTimeout(clientv3.WithRequireLeader(l.b.ctx), l.b.opts.probeTimeout)
	defer cancel()
	serve := max(d/4, time.Second)
	// A second more than needed: an append may take that long to arrive.
	ttl := int64((d+serve+time.Second-1)/time.Second) + 1
	start := time.Now() // before the server starts to count
	resp, err := l.b.client.Grant(ctx, ttl)
	l.mu.Lock()
	defer l.mu.Unlock()
	if g.err = err; err == nil {
		g.id = resp.ID
		if l.of[d] == r { // not dropped meanwhile
			r.id, r.until = resp.ID, start.Add(serve)
		}
	}
	r.grant = nil
	close(g.done)
}

// drop forgets all leases, because the server does not know one of them.
func (l *leases) drop() {
	l.mu.Lock()
	defer l.mu.Unlock()
	clear(l.of)
}

// fresh tells whether t is still to come, by monotonic and by wall time: the former stands
// still while a machine sleeps, and the server's clock does not.
func fresh(t time.Time) bool {
	n := time.Now()
	return n.Before(t) && n.Round(0).Before(t.Round(0))
}

// coarse rounds d up by at most an eighth, so that callers who close channels for all sorts of
// times still share a few leases.
func coarse(d time.Duration) time.Duration {
	step := time.Second // what etcd counts in
	for step*16 <= d {
		step *= 2
	}
	return (d + step - 1).Truncate(step)
}
