package etcd

import (
	"context"
	"errors"
	"fmt"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/connectivity"

	"github.com/dchannel/dchannel"
)

// mostRetry is the longest pause between probes while they fail.
const mostRetry = time.Second

// probeLoop asks the server for a sign of life every so often, sooner while there is none, and at
// once when the connection has changed.
func (p *push) probeLoop() {
	o := &p.b.opts
	timer := time.NewTimer(o.probeEvery)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-p.kick:
		case <-p.ctx.Done():
			return
		}
		err := p.probe()
		if p.ctx.Err() != nil {
			return
		}
		next := o.probeEvery
		if err != nil {
			next = min(next, mostRetry)
			p.reconnect(err)
		}
		p.answered(err)
		timer.Reset(next)
	}
}

func (p *push) answered(err error) {
	p.mu.Lock()
	same := p.answers == (err == nil)
	p.mu.Unlock()
	if !same {
		p.turn(err, func() { p.answers = err == nil })
	}
}

var (
	errNoAnswer   = errors.New("the server did not answer in time")
	errNoProgress = errors.New("the watch did not answer in time")
)

// probe reads the namespace's ID through consensus, which proves that the cluster works and
// is the one that it was, and then asks the watch for its progress: in a cluster the two may be
// on connections to different members.
func (p *push) probe() error {
	ctx, cancel := context.WithTimeoutCause(clientv3.WithRequireLeader(p.ctx), p.b.opts.probeTimeout, errNoAnswer)
	defer cancel()
	ask := func() error {
		_, _, err := p.b.ask(ctx, []clientv3.Op{clientv3.OpGet(p.b.keys.id)})
		return err
	}
	err := ask()
	if errors.Is(err, dchannel.ErrUnavailable) {
		err = ask() // a connection that breaks is no interruption if the next one works
	}
	if err != nil {
		return fmt.Errorf("probe: %w", timedOut(ctx, err, errNoAnswer))
	}
	if err := p.b.renew(ctx); err != nil {
		return fmt.Errorf("probe: %w", timedOut(ctx, err, errNoAnswer))
	}
	p.mu.Lock()
	progress := p.progress
	p.mu.Unlock()
	if progress == nil {
		return nil // being opened, with a timeout of its own
	}
	select {
	case <-p.heard: // an earlier answer, late
	default:
	}
	patience := time.NewTimer(p.b.opts.probeTimeout / 4)
	defer patience.Stop()
	for {
		if err := progress(ctx); err != nil {
			return nil // the watch has just ended, and its loop knows
		}
		select {
		case <-p.heard:
			return nil
		case <-patience.C:
			// The client has resumed the watch at a revision that does not exist yet, and nothing has been
			// written since: the server does not answer for such a watch. Give it one.
			if err := p.b.identify(ctx); err != nil {
				return fmt.Errorf("probe: %w", timedOut(ctx, err, errNoAnswer))
			}
		case <-ctx.Done():
			p.restartWatch(errNoProgress)
			return fmt.Errorf("probe: %w", errNoProgress)
		}
	}
}

// reconnect helps the client to a connection that works. If it has none, it may be in the middle of a
// pause that began during the outage and can last minutes. If it thinks that it has one, this one
// is half open: taking the endpoints away and giving them back makes it dial anew, while
// requests under way end in peace on the old connection.
func (p *push) reconnect(err error) {
	c := p.b.client
	conn := c.ActiveConnection()
	if conn.GetState() == connectivity.TransientFailure {
		conn.ResetConnectBackoff()
		return
	}
	if errors.Is(err, errNoAnswer) || errors.Is(err, errNoProgress) {
		if endpoints := c.Endpoints(); len(endpoints) > 0 {
			c.SetEndpoints()
			c.SetEndpoints(endpoints...)
		}
	}
}

// connectionLoop asks for a probe whenever the connection has changed, so that an interruption and its end
// show at once and not at the next interval.
func (p *push) connectionLoop() {
	conn := p.b.client.ActiveConnection()
	for s := conn.GetState(); conn.WaitForStateChange(p.ctx, s) && s != connectivity.Shutdown; {
		s = conn.GetState()
		if s == connectivity.Idle {
			conn.Connect()
		}
		select {
		case p.kick <- struct{}{}:
		default:
		}
	}
}

func timedOut(ctx context.Context, err, reason error) error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return reason
	}
	return err
}
