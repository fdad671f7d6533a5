package testserver

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"sync"

	"github.com/dchannel/dchannel/internal/testserver/port"
)

// start starts a cluster of n servers, which may be 1.
func start(ctx context.Context, n int, k kind, mode TLSMode) ([]*Server, error) {
	nodes := make([]*Server, n)
	err := func() error {
		for i := range nodes {
			dir, err := os.MkdirTemp("", "dchannel-"+k.name+"-")
			if err != nil {
				return err
			}
			nodes[i] = &Server{kind: k, dir: dir, index: i, nodes: nodes}
			if err := nodes[i].identify(mode); err != nil {
				return err
			}
		}
		for attempt := 1; ; attempt++ {
			err := launchAll(ctx, nodes)
			if err == nil || !errors.Is(err, errBind) || attempt == bindAttempts {
				return err
			}
		}
	}()
	if err == nil {
		return nodes, nil
	}
	err = fmt.Errorf("start %s: %w", k.name, err)
	for _, s := range nodes {
		if s != nil {
			err = fmt.Errorf("%w%s", err, quoteLog(s.Log()))
			s.Close()
		}
	}
	return nil, err
}

// one is the only server of a cluster of one.
func one(nodes []*Server, err error) (*Server, error) {
	if err != nil {
		return nil, err
	}
	return nodes[0], nil
}

// identify gives the server its certificates, or those of the cluster's first node.
func (s *Server) identify(mode TLSMode) (err error) {
	switch {
	case mode == NoTLS:
	case s.index > 0:
		s.identity = s.nodes[0].identity
	default:
		s.identity, err = newIdentity(s.dir, mode)
	}
	return err
}

// launchAll gives all nodes new ports and runs them at once, as each is ready only
// when it has met the others. If one cannot, none is left running.
func launchAll(ctx context.Context, nodes []*Server) error {
	for _, s := range nodes {
		// An attempt before this one may have left data that name its ports.
		if err := errors.Join(s.Wipe(), s.reserve()); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	errs := make([]error, len(nodes))
	var wg sync.WaitGroup
	for i, s := range nodes {
		wg.Go(func() {
			if errs[i] = s.launch(ctx); errs[i] != nil {
				cancel() // the others would wait for this one
			}
		})
	}
	wg.Wait()
	err := errors.Join(errs...)
	if err != nil {
		for _, s := range nodes {
			if p, notRunning := s.live(); notRunning == nil {
				p.kill()
			}
		}
	}
	return err
}

// reserve gives the server new ports.
func (s *Server) reserve() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range s.ports {
		p.Release()
	}
	s.ports = nil
	for range s.kind.ports {
		p, err := port.Reserve()
		if err != nil {
			return err
		}
		s.ports = append(s.ports, p)
	}
	return nil
}

// healthy gets a page and looks for what it says when all is well.
func healthy(ctx context.Context, url string, cfg *tls.Config, want string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
	if err != nil {
		return err
	}
	transport := &http.Transport{TLSClientConfig: cfg, DisableKeepAlives: true}
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 4<<10))
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK || !strings.Contains(string(body), want) {
		return fmt.Errorf("health: %s %q", resp.Status, body)
	}
	return nil
}
